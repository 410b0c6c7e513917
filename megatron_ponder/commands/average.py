"""Average the weights of several checkpoints into one, to use or to begin a run with.

Example:
    ponder average --checkpoint runs/tiny --last 2 --output averaged

--last N takes the latest checkpoint of each run folder and those before it, as many as there are N; without it each
folder is a run, whose latest counts, or a checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import command
from megatron_ponder.base.launch import one_process
from megatron_ponder.checkpoint.averaging import average, checkpoints_to_average
from megatron_ponder.config.command_options import Number
from megatron_ponder.config.declarations import Range


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("average", __doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="run or checkpoint folders")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder; must not exist or be empty")
    newest = Number("last", int, Range(1, 10**6))
    parser.add_argument("--last", type=newest, metavar="N", help="average the newest N checkpoints of each run folder")
    parser.add_argument(
        "--weights",
        type=Number("weights", float, Range(1e-9, 1e12)),
        nargs="+",
        metavar="X",
        help="of each checkpoint in the average; the same unless given",
    )
    arguments = parser.parse_args(argv)
    folders = checkpoints_to_average(arguments.checkpoint, arguments.last)
    manifest = average(folders, arguments.output, arguments.weights)
    tensors = counted(len(manifest.tensors), "tensor")
    print(f"{arguments.output}: average of {counted(len(folders), 'checkpoint')}, {tensors} of weights")
    for folder, share in manifest.averaged.items():
        print(f"{share:9.4f}  {folder}")
