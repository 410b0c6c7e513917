"""Show what is in an indexed dataset: header, counts, lengths of documents, text.

With --verify, all of it is read and checked.

Example:
    ponder inspect-dataset data/corpus_text_document --tokenizer data/tokenizer.model --verify
"""

from collections.abc import Sequence

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.paths import expand_user
from megatron_ponder.config.command_options import Number
from megatron_ponder.config.declarations import STEPS, Range
from megatron_ponder.data.dataset_manifest import read_dataset_manifest
from megatron_ponder.data.dataset_summary import length_histogram, verify
from megatron_ponder.data.indexed_dataset import VERSION, IndexedDataset
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer

BAR = 40


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, do it, print what came of it."""
    parser = Parser("inspect-dataset", __doc__)
    parser.add_argument("dataset", type=expand_user, help="path without .bin and .idx")
    parser.add_argument(
        "--tokenizer", type=expand_user, help="shows samples as text, and gives the vocabulary that --verify checks"
    )
    documents, tokens = (Number(name, int, Range(0, STEPS)) for name in ("samples", "sample_tokens"))
    parser.add_argument("--samples", type=documents, default=3, help="documents to show, evenly spaced (default: 3)")
    parser.add_argument("--sample-tokens", type=tokens, default=64, help="tokens to show of each (default: 64)")
    parser.add_argument(
        "--verify", action="store_true", help="read everything: offsets, bounds, ids below the vocabulary, checksums"
    )
    arguments = parser.parse_args(argv)
    dataset = IndexedDataset(arguments.dataset)
    dataset.check_index()
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    show_header(dataset, tokenizer)
    show_histogram(dataset)
    show_samples(dataset, tokenizer, arguments.samples, arguments.sample_tokens)
    if arguments.verify:
        print("verified")
        for line in verify(arguments.dataset, None if tokenizer is None else tokenizer.vocab_size):
            print(f"  {line}")


def show_header(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> None:
    """Print what the index and the manifest say.

    Raises:
        UserError: the manifest names another tokenizer.
    """
    print(f"{dataset.prefix}: version {VERSION}, tokens of type {dataset.dtype.name}")
    print(
        f"  {counted(len(dataset), 'sequence')}, {counted(dataset.num_documents, 'document')}, "
        f"{counted(dataset.num_tokens, 'token')}, "
        f"{dataset.num_tokens / dataset.num_documents:,.1f} tokens per document"
    )
    manifest = read_dataset_manifest(dataset.prefix)
    if manifest is None:
        print("  no manifest")
        return
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
        raise UserError(f"{tokenizer.path} is not the tokenizer that {dataset.prefix} was made with: give that one")
    print(
        f"  vocabulary {manifest.vocab_size:,}, end token {manifest.eod_id}, tokenizer {manifest.tokenizer[:16]}, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes per token"
    )


def show_histogram(dataset: IndexedDataset) -> None:
    """Print how many documents there are of which length."""
    histogram = length_histogram(dataset)
    most = max(documents for _, _, documents, _ in histogram)
    print("tokens per document")
    for shortest, longest, documents, tokens in histogram:
        name = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
        bar = "#" * -(-BAR * documents // most)
        share = 100 * tokens / dataset.num_tokens
        print(f"  {name:>27}  {documents:>14,} documents  {share:5.1f} % of the tokens  {bar}")


def show_samples(dataset: IndexedDataset, tokenizer: Tokenizer | None, samples: int, length: int) -> None:
    """Print the beginnings of documents from all over the dataset."""
    samples = min(samples, dataset.num_documents)
    for number in (at * dataset.num_documents // samples for at in range(samples)):
        whole = dataset.read_document(number)
        ids = whole[:length].tolist()
        text = " ".join(map(str, ids)) if tokenizer is None else on_one_line(tokenizer.decode(ids))
        print(f"document {number:,}, {counted(len(whole), 'token')}: {text}{' ...' if len(whole) > length else ''}")


def on_one_line(text: str) -> str:
    """The text on one line, with line ends and control characters as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
