"""Serve a trained model over HTTP, with OpenAI's completions endpoint.

    ponder serve --checkpoint runs/quickstart
    ponder serve --checkpoint runs/quickstart --port 8080 --threshold 0.3 --api-key-file key.txt
    torchrun --nproc_per_node 4 -m megatron_ponder serve --checkpoint runs/quickstart --tensor 2 --pipeline 2

Also under srun and mpirun. The key may stand in the environment variable PONDER_API_KEY instead of a file.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.environment import without_local_rank
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.launch import discover
from megatron_ponder.base.texts import read_text
from megatron_ponder.config.command_options import add_options, from_options
from megatron_ponder.generation.loading import Setup
from megatron_ponder.generation.ranks import LACKING, joined
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.parallel.collectives import from_first


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line and serve until a signal."""
    try:
        from megatron_ponder.serving import serving
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install 'megatron_ponder[serve]'") from None
    parser = Parser("serve", __doc__, LACKING)
    add_options(parser, Setup, "checkpoint")
    parser.add_argument("--model-name", help="under which clients know the model; the folder's unless given")
    parser.add_argument("--api-key-file", type=Path, help="a file with the key that clients must send")
    add_options(parser.add_argument_group("where it listens"), serving.Address)
    work = parser.add_argument_group("computation")
    add_options(work, Setup, "threshold", "router_bias", "confidence_exit", "precision", "tensor", "pipeline")
    add_options(work, Batching, "max_sequences", "max_slots")
    limits = parser.add_argument_group("limits")
    add_options(limits, serving.Patience)
    add_options(limits, serving.Limits, "timeout", "max_body_bytes")
    add_options(limits, serving.ConnectionLimits)
    arguments = parser.parse_args(without_local_rank(argv))

    launch = discover()
    with joined(launch) as device:
        serving.run(from_first(partial(_service, serving, arguments)), launch, device)


def _service(serving: ModuleType, arguments: argparse.Namespace):
    """What is to be served, and how; the rank that schedules says it to all."""
    return serving.Service(
        setup=from_options(Setup, arguments, batching=from_options(Batching, arguments)),
        model_name=arguments.model_name or arguments.checkpoint.resolve().name,
        address=from_options(serving.Address, arguments),
        limits=from_options(serving.Limits, arguments, api_key=_api_key(arguments.api_key_file)),
        connections=from_options(serving.ConnectionLimits, arguments),
        patience=from_options(serving.Patience, arguments),
    )


def _api_key(file: Path | None) -> str | None:
    """From the file, or the environment; None if there is neither."""
    return os.environ.get("PONDER_API_KEY") if file is None else read_text(file).strip()
