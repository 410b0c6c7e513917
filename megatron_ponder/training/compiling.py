"""Compiling the blocks of a model that is about to train."""

import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config
from megatron_ponder.estimates.rank import plan_of, runs_once
from megatron_ponder.model.compiled import CompiledBlock
from megatron_ponder.model.ponder import PonderLM


def compile_blocks(model: PonderLM, config: Config, device: torch.device, backend: str = "inductor") -> None:
    """Let a model's blocks be compiled when they next run with gradients, if the configuration wants it.

    Every shape that is run from now on gets a graph of its own, but packed passes have theirs for all shapes.

    Args:
        model: this rank's part.
        config: resolved.
        device: of this rank.
        backend: as of `torch.compile`.

    Raises:
        UserError: if nothing can be compiled on this machine.
    """
    if config.training.compile:
        _try_compiler(device, backend)
        model.transformer.compiled = CompiledBlock(most_graphs(model, config), backend)


# Whether keys have weights, whether attention is computed again, and whether the last block cuts slots: or, with
# sequence parallelism, where it cuts none, whether the shares of ranks are equal.
PACKED_GRAPHS = 2**3


def most_graphs(model: PonderLM, config: Config) -> int:
    """Graphs that a run may need: by slots a token, which of them are kept, and whether attention is computed again.

    Where every slot is run once, by the number of earlier steps, and one for tokens alone. Those of packed passes are
    as many for any numbers of slots. Twice as many, because the first pass that has gradients may read a state that
    has none.
    """
    kinds, once = set(), runs_once(config)
    for refinements in config.ponder_training.refinement_choices:
        plan = plan_of(config, refinements)
        for index, slots in enumerate(plan):
            kept = range(slots)[model.passes.kept(index, plan)]
            again = model.recompute.of_pass(index) == "attention"
            kinds |= {(slots, range(slots), again), (index + 1, once, again) if once else (slots, kept, again)}
    training = config.ponder_training
    packed = PACKED_GRAPHS if training.packed and training.prune_start is not None else 0
    packed *= model.passes.steps if once else 1
    return 2 * (len(kinds) + packed)


def _try_compiler(device: torch.device, backend: str) -> None:
    """Compile the smallest function there is, because only that tells whether all that is needed is installed."""
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:
        needed = "a C++ compiler and Python's headers (on Debian and Ubuntu, apt-get install g++ python3-dev)"
        if device.type == "cuda":
            needed += " and Triton (pip install triton)"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"training.compile needs {needed}, and could not compile on this machine: {reason}; install them, or set "
            "training.compile to false"
        ) from error
