"""Join indexed datasets of the same tokenizer into one, in the order given.

Example:
    ponder merge --input data/a_text_document data/b_text_document --output-prefix data/both
"""

from collections.abc import Sequence

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import command
from megatron_ponder.base.launch import one_process
from megatron_ponder.base.paths import expand_user
from megatron_ponder.data.merging import merge_datasets


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("merge", __doc__)
    parser.add_argument(
        "--input", type=expand_user, nargs="+", required=True, help="datasets, as paths without .bin and .idx"
    )
    parser.add_argument(
        "--output-prefix", type=expand_user, required=True, help="path of the new dataset without .bin and .idx"
    )
    arguments = parser.parse_args(argv)
    dataset = merge_datasets(arguments.input, arguments.output_prefix)
    print(f"{dataset.prefix}: {counted(dataset.num_documents, 'document')}, {counted(dataset.num_tokens, 'token')}")
