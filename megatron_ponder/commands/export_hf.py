"""Export a checkpoint to a folder that Hugging Face transformers loads.

Example:
    ponder export-hf --checkpoint runs/tiny --output exported
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import command
from megatron_ponder.base.launch import one_process
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.hf.export import DataType, export_checkpoint
from megatron_ponder.hf.measured import measured_section


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("export-hf", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder (its latest) or checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=get_args(DataType), default="float32", help="of the exported weights")
    parser.add_argument("--metrics", type=Path, nargs="+", help="files of ponder evaluate --output, for the model card")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    arguments = parser.parse_args(argv)
    folder = resolve_checkpoint(arguments.checkpoint)
    export_checkpoint(
        folder,
        arguments.output,
        arguments.dtype,
        measured_section(arguments.metrics, folder.name) if arguments.metrics else None,
        arguments.max_shard_size,
    )
    print(f"{arguments.output}: exported {folder}")
