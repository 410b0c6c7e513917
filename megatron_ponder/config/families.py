"""Families of transformers: names for sets of features, which a configuration may change one by one.

A family that is made of known features is an entry here, and a reader in `hf/foreign_families.py`.
"""

from typing import Literal

# By the names of the fields of `ModelConfig`; a family says all of them.
_LLAMA = {
    "norm": "rms",
    "gated_ffn": True,
    "activation": "silu",
    "biases": "none",
    "qk_norm": False,
    "rotary_fraction": 1.0,
    "residual": "sequential",
}
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA | {"biases": "qkv"},
    "qwen3": _LLAMA | {"qk_norm": True},
    "gpt_neox": {
        "norm": "layer",
        "gated_ffn": False,
        "activation": "gelu",
        "biases": "all",
        "qk_norm": False,
        "rotary_fraction": 0.25,
        "residual": "parallel",
    },
}
Family = Literal[tuple(FAMILIES)]
