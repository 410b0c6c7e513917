"""Documents cut into segments that are encoded apart from each other, and grouped into chunks of work."""

import re
from collections.abc import Iterable, Iterator

from megatron_ponder.data.text_files import TextPart
from megatron_ponder.data.tokenizer import Tokenizer

# A worker gets this much text at a time, enough to make the cost of handing it over small.
CHUNK_CHARACTERS = 1 << 18
# Byte-pair encoding slows down with the length of the text: by a third from this to a whole chunk.
SEGMENT_CHARACTERS = 1 << 14
# Text without a place where it may be cut is cut here all the same, because memory is finite.
LONGEST_SEGMENT = 1 << 22
# Between a word and the single space after it no tokenizer of the usual kinds has a token.
WORD_END = re.compile(r"(?<=\S)(?= \S)")


def cuts_at_word_ends(tokenizer: Tokenizer) -> bool:
    """Whether a long text may be encoded in parts; not so for tokenizers that put a space before every text."""
    return tokenizer.encode("one two") == tokenizer.encode("one") + tokenizer.encode(" two")


def cut_segments(parts: Iterable[TextPart], may_cut: bool) -> Iterator[TextPart]:
    """Cut long documents, so that they are encoded faster and a huge file is spread over the workers.

    Where the cuts fall depends on the text of a document alone, not on the parts in which it comes.

    Args:
        parts: documents, in order, each in one part or several.
        may_cut: cut at ends of words; else only where a segment would become too long to hold.
    """
    held = ""
    # How far the text at hand has been searched for the end of a word, so that no text is searched twice.
    searched = 0
    for part in parts:
        held += part.text
        start = 0
        while True:
            end, searched = _next_cut(held, start, max(searched, start), may_cut)
            if end is None:
                break
            yield TextPart(held[start:end], ends_document=False)
            start = searched = end
        if part.ends_document:
            yield TextPart(held[start:], ends_document=True)
            held, searched = "", 0
        else:
            held, searched = held[start:], searched - start


def group_chunks(segments: Iterable[TextPart]) -> Iterator[list[TextPart]]:
    """Group segments until they have `CHUNK_CHARACTERS`."""
    chunk: list[TextPart] = []
    size = 0
    for segment in segments:
        chunk.append(segment)
        size += len(segment.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _next_cut(text: str, start: int, searched: int, may_cut: bool) -> tuple[int | None, int]:
    """Where the segment from `start` on ends, or None for not in this text; and how far has been searched."""
    limit = start + LONGEST_SEGMENT
    if may_cut:
        found = WORD_END.search(text, max(start + SEGMENT_CHARACTERS, searched), limit + 2)
        if found:
            return found.start(), found.start()
        # The character after the last one may still make an end of a word of it.
        searched = max(searched, len(text) - 1)
    return _forced_cut(text, start, limit) if len(text) > limit + 2 else None, searched


def _forced_cut(text: str, start: int, limit: int) -> int:
    line_end = text.rfind("\n", start, limit) + 1
    return line_end or max(text.rfind(" ", start + 1, limit), 0) or limit
