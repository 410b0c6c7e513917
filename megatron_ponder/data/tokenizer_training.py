"""Train a SentencePiece tokenizer that gives back any text exactly."""

import heapq
import io
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, write_atomically
from megatron_ponder.data.corpus import cut_inputs, read_corpus
from megatron_ponder.data.formats import AUTO
from megatron_ponder.data.inputs import describe_counts, find_inputs
from megatron_ponder.data.progress import StageDisplay, warn
from megatron_ponder.data.text_files import ReadingCounts, TextPart
from megatron_ponder.data.tokenizer import SentencePieceTokenizer

EXCERPT_CHARACTERS = 4096
SPECIAL_AND_BYTES = 3 + 256
ROUND_TRIPS = 1000
AWKWARD_TEXTS = ("", " ", "  \t\n\n x \r\n", "\u2581 \u2585\0", "naïve 東京 \U0001f642 \u200b", "<s></s><unk><0x41>")
# Characters that SentencePiece keeps for its own bookkeeping: it drops, or misreads, training text with one of them.
RESERVED = re.compile("[\0\t\u2581\u2585]")


def train_tokenizer(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    vocab_size: int,
    key: str = "text",
    declared: str = AUTO,
    sample_bytes: int = 256 << 20,
    seed: int = 0,
) -> SentencePieceTokenizer:
    """Train on a random sample of a corpus and write `{output_prefix}.model` and `.vocab`.

    Byte-pair encoding with ids 0 `<unk>`, 1 `<s>`, 2 `</s>`, then the 256 bytes, which stand in for characters the
    vocabulary lacks. Nothing is normalised, so that decoding an encoded text returns it exactly; runs of spaces and
    line ends merge into tokens like letters do. The same input, sizes and seed give the same files.

    Args:
        inputs, key, declared: the corpus, see `find_inputs` and `read_range`.
        vocab_size: tokens in all.
        sample_bytes: text to train on, at most; also what is held in memory.

    Raises:
        UserError: the corpus is empty, or allows only a smaller (or demands a larger) vocabulary, or the tokenizer does
            not give back text as it was.
    """
    if vocab_size <= SPECIAL_AND_BYTES:
        raise UserError(
            f"--vocab-size is {vocab_size}; set it above {SPECIAL_AND_BYTES}, which special tokens and bytes take"
        )
    found, tally = find_inputs(inputs, declared), ReadingCounts()
    for warning in found.warnings():
        warn(warning)
    ranges = cut_inputs(found, range_bytes=1 << 62)
    with StageDisplay(sum(part.input_bytes for part in ranges)) as show:
        segments = show.following(read_corpus(found, key, tally), tally)
        sample = _sample(_excerpts(segments), sample_bytes, random.Random(seed))
        size = sum(len(excerpt.encode()) for excerpt in sample)
        show.stage(f"training {vocab_size:,} tokens on {size / 1e6:,.1f} MB of text")
        model = _train(sample, vocab_size)
        _check_round_trip(model, sample)
    if tally.skipped:
        warn(f"skipped: {describe_counts(tally.skipped)}")

    model_path, vocab_path = Path(f"{output_prefix}.model"), Path(f"{output_prefix}.vocab")
    make_folder(model_path.parent)
    write_atomically(vocab_path, _vocabulary(model).encode())
    write_atomically(model_path, model)
    return SentencePieceTokenizer(model_path)


def _check_round_trip(model: bytes, sample: Sequence[str]) -> None:
    """Encode and decode text of the sample, and text that is in no corpus, before the model is given to anybody."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model)
        tokenizer = SentencePieceTokenizer(path)
    for text in (*sample[:ROUND_TRIPS], *AWKWARD_TEXTS):
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise UserError(f"the trained tokenizer does not give back {text[:40]!r}; train on other text")


def _excerpts(parts: Iterable[TextPart]) -> Iterator[str]:
    """Cut documents into pieces of at most `EXCERPT_CHARACTERS`, after a line end where there is one."""
    held = ""
    for part in parts:
        text = held + part.text
        start = 0
        while start < len(text):
            end = start + EXCERPT_CHARACTERS
            if end >= len(text) and not part.ends_document:
                break
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield text[start:end]
            start = end
        held = text[start:]


def _sample(excerpts: Iterable[str], sample_bytes: int, generator: random.Random) -> list[str]:
    """A uniform sample, in the order of the corpus: each excerpt draws a number, the largest numbers make room."""
    kept: list[tuple[float, int, str]] = []
    total = 0
    for position, excerpt in enumerate(excerpts):
        heapq.heappush(kept, (-generator.random(), position, excerpt))
        total += len(excerpt.encode())
        while total > sample_bytes and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode())
    return [excerpt for _, _, excerpt in sorted(kept, key=lambda item: item[1])]


def _train(sample: Sequence[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for excerpt in sample for part in RESERVED.split(excerpt) if part),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * EXCERPT_CHARACTERS,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _size_error(vocab_size, str(error)) from None
    return model.getvalue()


def _size_error(vocab_size: int, message: str) -> UserError:
    """SentencePiece says in prose which sizes would have worked."""
    if largest := re.search(r"too high .*value <= (\d+)", message):
        return UserError(
            f"the text allows at most {largest[1]} tokens, not {vocab_size}; "
            f"set --vocab-size to at most {largest[1]}, or give more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(f"{vocab_size} tokens are too few for the text; set --vocab-size to at least {smallest[1]}")
    return UserError(f"SentencePiece cannot train on this text ({message.strip()}); give more or other text")


def _vocabulary(model: bytes) -> str:
    """SentencePiece's own `.vocab` format: a line per token, piece and score."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    return "".join(f"{processor.id_to_piece(token)}\t{processor.get_score(token):g}\n" for token in ids)
