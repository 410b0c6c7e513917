"""Checks of what a run is to save; every message says what to write instead."""

import math

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.sections import Config


def validate_saving(config: Config) -> None:
    """Refuse checkpoints that would not be kept, and exports that could not be made.

    Raises:
        UserError: for the first contradiction found.
    """
    every, interval = config.checkpoint.keep_every, config.checkpoint.interval
    if every % interval:
        raise UserError(
            f"checkpoint.keep_every {every} is no multiple of checkpoint.interval {interval}, so that steps to be kept "
            f"would not be saved; set it to a multiple, such as {interval * math.ceil(every / interval)}"
        )
    if config.checkpoint.export_hf == "none":
        return
    if config.ponder.routes_by_token:
        raise UserError(
            "checkpoint.export_hf cannot be used with ponder.router_input token, a control that cannot be exported; "
            "leave checkpoint.export_hf out"
        )
    if config.data.reset_at_eod and not config.tokenizer.path:
        raise UserError(
            "checkpoint.export_hf with data.reset_at_eod needs to know the end-of-document token; set tokenizer.path"
        )
