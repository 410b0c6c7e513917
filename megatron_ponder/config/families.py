"""Families of transformers: names for sets of features, which a configuration may change one by one.

A family that is made of known features is an entry here, and a reader in `hf/pretrained_config.py`.
"""

from typing import Literal

# By the names of the fields of `ModelConfig`; a family says all of them.
FAMILIES = {
    "llama": {
        "norm": "rms",
        "gated_ffn": True,
        "activation": "silu",
        "biases": "none",
        "rotary_fraction": 1.0,
        "residual": "sequential",
    },
    "gpt_neox": {
        "norm": "layer",
        "gated_ffn": False,
        "activation": "gelu",
        "biases": "all",
        "rotary_fraction": 0.25,
        "residual": "parallel",
    },
}
Family = Literal[tuple(FAMILIES)]
