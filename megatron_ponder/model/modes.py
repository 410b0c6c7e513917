"""Which passes belong to which mode."""

from megatron_ponder.config import PonderConfig
from megatron_ponder.model.baselines import LoopPasses, PausePasses, PonderLMPasses
from megatron_ponder.model.passes import Passes

_BASELINES = {"pause": PausePasses, "loop": LoopPasses, "ponderlm": PonderLMPasses}


def passes_of(ponder: PonderConfig) -> Passes:
    """The passes of a mode."""
    return _BASELINES.get(ponder.mode, Passes)(ponder.steps, routed=ponder.mode == "adaptive")
