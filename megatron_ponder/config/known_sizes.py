"""Sizes of models that people train, by name, each with the learning rate that was published for it or its like.

Pythia is Biderman et al. (2023), table 1; LLaMA's sizes are those of PonderLM's authors. Learning rates are Pythia's,
those of PonderLM's authors (410M and 1.4B), or of the nearest GPT-3 (Brown et al., 2020, table 2.1).
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

    model: dict[str, str | int | float]
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
