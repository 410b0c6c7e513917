"""Train a SentencePiece tokenizer on text, JSON Lines, Parquet and saved datasets.

Example:
    ponder train-tokenizer --input corpus/ --output-prefix data/tokenizer --vocab-size 32000
"""

from collections.abc import Sequence

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import command
from megatron_ponder.base.launch import one_process
from megatron_ponder.base.paths import expand_user
from megatron_ponder.config.command_options import Number, add_options
from megatron_ponder.config.declarations import Range
from megatron_ponder.data.inputs import Source
from megatron_ponder.data.tokenizer_training import train_tokenizer


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("train-tokenizer", __doc__)
    add_options(parser, Source)
    parser.add_argument("--output-prefix", type=expand_user, required=True, help="path of the tokenizer without .model")
    size = Number("vocab_size", int, Range(1, 2**31))
    parser.add_argument("--vocab-size", type=size, required=True, help="number of tokens")
    parser.add_argument(
        "--sample-bytes",
        type=Number("sample_bytes", int, Range(1, 2**50)),
        default=256 << 20,
        help="train on a random sample of at most this much text (default: 256 MiB)",
    )
    arguments = parser.parse_args(argv)
    tokenizer = train_tokenizer(
        arguments.input,
        arguments.output_prefix,
        arguments.vocab_size,
        key=arguments.key,
        declared=arguments.format,
        sample_bytes=arguments.sample_bytes,
    )
    print(f"{tokenizer.path}: {tokenizer.vocab_size:,} tokens")
