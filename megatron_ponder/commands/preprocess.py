"""Tokenise text, JSON Lines, Parquet and saved datasets into an indexed dataset.

Writes PREFIX_KEY_document.bin and .idx, in Megatron's format, and .json. A JSON line (.jsonl, .ndjson, .json) and a row
of a table (.parquet) are one document each, and so is any other file. Files may be compressed (.gz, .bz2, .xz, .zst).
Started by mpirun, srun or torchrun, the ranks share the work. A run that was interrupted goes on from its finished
shards when started again.

Example:
    ponder preprocess --input corpus/*.jsonl.zst --output-prefix data/corpus \\
        --tokenizer data/tokenizer.model --workers 8 --append-eod
"""

from collections.abc import Sequence

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.environment import without_local_rank
from megatron_ponder.base.errors import command
from megatron_ponder.base.paths import expand_user
from megatron_ponder.config.command_options import Number, add_options
from megatron_ponder.config.declarations import Range
from megatron_ponder.data.inputs import Source
from megatron_ponder.data.preprocessing import Team, preprocess


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("preprocess", __doc__)
    add_options(parser, Source)
    parser.add_argument(
        "--output-prefix", type=expand_user, required=True, help="path of the dataset without _KEY_document.bin"
    )
    parser.add_argument(
        "--tokenizer", type=expand_user, required=True, help="a .model or tokenizer.json file, or a folder with one"
    )
    several = Number("workers", int, Range(1, 10**4))
    parser.add_argument("--workers", type=several, default=1, help="processes per rank that tokenise (default: 1)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end token")
    arguments = parser.parse_args(without_local_rank(argv))
    # Here, because every worker imports this file again and has no use for PyTorch, which this one imports.
    from megatron_ponder.base.launch import discover

    launch = discover()
    # The address that ranks meet at tells one start of them from another.
    team = Team(launch.rank, launch.world_size, f"{launch.address}-{launch.port}") if launch.world_size > 1 else None
    report = preprocess(
        arguments.input,
        arguments.output_prefix,
        arguments.tokenizer,
        workers=arguments.workers,
        append_eod=arguments.append_eod,
        key=arguments.key,
        declared=arguments.format,
        team=team,
    )
    if report is not None:
        print(report)
