"""What each mode does: its passes, and what it makes of embedding and head.

The methods that pondering is compared with share everything else with the paper's modes: transformer, embedding scale,
initialisation, loss. Another mode is a file here, a row of this table, and its name in the configuration.
"""

from megatron_ponder.config import PonderConfig
from megatron_ponder.model.modes.loop import LoopPasses
from megatron_ponder.model.modes.pause import PausePasses
from megatron_ponder.model.modes.pondering import Passes, RoutedPasses
from megatron_ponder.model.modes.ponderlm import PonderLMPasses

_PASSES = {
    "vanilla": Passes,
    "fixed": Passes,
    "adaptive": RoutedPasses,
    "pause": PausePasses,
    "sps": PausePasses,
    "loop": LoopPasses,
    "ponderlm": PonderLMPasses,
}


def passes_of(ponder: PonderConfig) -> Passes:
    """The passes of a mode."""
    return _PASSES[ponder.mode](ponder.steps, ponder.own_latents)
