"""Sizes of models that people train, by name, each with the learning rate that was published for it or its like.

Pythia is Biderman et al. (2023), table 1; LLaMA's sizes are those of PonderLM's authors; the others are in the
`config.json` of released models, whose scaling of rotary frequencies is left out. Learning rates are Pythia's, those of
PonderLM's authors (410M and 1.4B), or of the nearest GPT-3 (Brown et al., 2020, table 2.1).
"""

import difflib
from dataclasses import dataclass

from megatron_ponder.base.errors import UserError


@dataclass(frozen=True)
class Size:
    """A size of a model, and what it is trained with.

    Attributes:
        model: keys of the section `model`.
        learning_rate: peak of the learning rate.
        global_batch_size: sequences of an optimiser step.
        sequence_length: tokens of a sequence.
    """

    model: dict[str, str | int | float | bool]
    learning_rate: float
    global_batch_size: int = 256
    sequence_length: int = 2048


def _llama(learning_rate: float, hidden: int, layers: int, heads: int, ffn: int) -> Size:
    model = {"family": "llama", "hidden_size": hidden, "num_layers": layers, "num_heads": heads}
    return Size(model | {"ffn_hidden_size": ffn, "vocab_size": 32_000, "norm_epsilon": 1e-5}, learning_rate)


def _pythia(learning_rate: float, hidden: int, layers: int, heads: int) -> Size:
    model = {"family": "gpt_neox", "hidden_size": hidden, "num_layers": layers, "num_heads": heads}
    others = {"ffn_hidden_size": 4 * hidden, "vocab_size": 50_304, "norm_epsilon": 1e-5, "rotary_fraction": 0.25}
    return Size(model | others, learning_rate)


def _released(learning_rate: float, hidden: int, layers: int, heads: int, groups: int, ffn: int, **others) -> Size:
    model = {"family": "llama", "hidden_size": hidden, "num_layers": layers, "num_heads": heads, "num_kv_heads": groups}
    return Size(model | {"ffn_hidden_size": ffn, "tie_embeddings": True} | others, learning_rate)


_SMOLLM = {"vocab_size": 49_152, "norm_epsilon": 1e-5, "rope_theta": 1e5}
_LLAMA_3 = {"vocab_size": 128_256, "norm_epsilon": 1e-5, "rope_theta": 5e5}
_QWEN_3 = {"head_size": 128, "qk_norm": True, "vocab_size": 151_936, "norm_epsilon": 1e-6, "rope_theta": 1e6}
_TINY = {"family": "llama", "hidden_size": 64, "num_layers": 3, "num_heads": 4, "ffn_hidden_size": 176}
SIZES = {
    "tiny": Size(_TINY | {"vocab_size": 2048}, 2e-3, global_batch_size=8, sequence_length=128),
    "pythia-70m": _pythia(1e-3, 512, 6, 8),
    "pythia-160m": _pythia(6e-4, 768, 12, 12),
    "pythia-410m": _pythia(3e-4, 1024, 24, 16),
    "pythia-1b": _pythia(3e-4, 2048, 16, 8),
    "pythia-1.4b": _pythia(2e-4, 2048, 24, 16),
    "pythia-2.8b": _pythia(1.6e-4, 2560, 32, 32),
    "llama-125m": _llama(6e-4, 768, 12, 12, 2064),
    "llama-410m": _llama(3e-4, 1024, 24, 16, 2752),
    "llama-834m": _llama(2.5e-4, 1536, 24, 24, 4128),
    "llama-1.4b": _llama(2e-4, 2048, 24, 32, 5504),
    "llama-2.8b": _llama(1.6e-4, 2048, 48, 32, 5504),
    "smollm2-135m": _released(6e-4, 576, 30, 9, 3, 1536, **_SMOLLM),
    "smollm2-360m": _released(3e-4, 960, 32, 15, 5, 2560, **_SMOLLM),
    "qwen3-0.6b": _released(2.5e-4, 1024, 28, 16, 8, 3072, **_QWEN_3),
    "llama-3.2-1b": _released(2e-4, 2048, 16, 32, 8, 8192, **_LLAMA_3),
}


def size_of(name: str) -> Size:
    """The size of this name, in any case.

    Raises:
        UserError: there is none; names those that are like it, or all.
    """
    known = SIZES.get(name.lower().replace("_", "-"))
    if known is None:
        like = [size for size in SIZES if size.endswith(f"-{name.lower()}")] or difflib.get_close_matches(name, SIZES)
        hint = f"did you mean {' or '.join(like)}?" if like else f"there are {', '.join(SIZES)}"
        raise UserError(f"no size is known as {name}; {hint}")
    return known
