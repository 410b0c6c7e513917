"""Where a text may be cut so that its parts have the same tokens as the whole, read from a SentencePiece model."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

# What SentencePiece writes in pieces for a space.
SPACE = "\u2581"
# A class of characters costs time at each part; what lies in smaller ones is not worth it.
MOST_CLASSES = 6
# Numbers of fields and values in SentencePiece's ModelProto, with the values that fields have when they are absent.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_TYPE = 1, 3
NORMAL_PIECE, USER_DEFINED_PIECE, UNUSED_PIECE = 1, 4, 5
MODEL_TYPE, SPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35
BYTE_PAIR_MODEL = 2
REPLACED_CHARACTERS, DUMMY_PREFIX, NO_EXTRA_SPACES, ESCAPED_SPACES = 2, 3, 4, 5


def separable_parts(model: bytes) -> re.Pattern[str] | None:
    """A pattern whose matches, one after another, make up any text and are encoded apart from each other.

    Byte-pair encoding merges two neighbours only into a piece of the vocabulary. So a text may be cut between two
    characters that are neighbours in no piece, and each side is merged as if the other were not there. The characters
    fall into classes that no piece mixes, apart from spaces at its beginning: a part is a run of spaces with the run
    of one class that follows it.

    Args:
        model: content of a SentencePiece `.model` file.

    Returns:
        The pattern, or None for a model about which this does not hold: another kind than byte pairs, one that changes
        the text before it encodes it, one with symbols that are found before anything is merged, or with spaces within
        pieces.
    """
    fields = list(_fields(model))
    trainer = dict(_fields(b"".join(value for number, value in fields if number == TRAINER)))
    normalizer = dict(_fields(b"".join(value for number, value in fields if number == NORMALIZER)))
    changes_text = (
        normalizer.get(REPLACED_CHARACTERS)
        or normalizer.get(DUMMY_PREFIX, 1)
        or normalizer.get(NO_EXTRA_SPACES, 1)
        or not normalizer.get(ESCAPED_SPACES, 1)
        or trainer.get(SPACE_AS_SUFFIX, 0)
    )
    if trainer.get(MODEL_TYPE, 1) != BYTE_PAIR_MODEL or changes_text:
        return None
    by_type: dict[int, list[str]] = {}
    for number, value in fields:
        if number == PIECES:
            piece = dict(_fields(value))
            by_type.setdefault(piece.get(PIECE_TYPE, NORMAL_PIECE), []).append(piece[PIECE_TEXT].decode())
    pieces = [*by_type.get(NORMAL_PIECE, ()), *by_type.get(UNUSED_PIECE, ())]
    # No text has a piece with a plain space in it, as the text has the other character there by then.
    classes = _classes(piece for piece in pieces if " " not in piece)
    if USER_DEFINED_PIECE in by_type or classes is None:
        return None
    # Without bytes, unknown characters beside each other become one token, and so must not be cut apart: all of them
    # have to lie in the last class.
    known = set(by_type.get(NORMAL_PIECE, ()))
    if not trainer.get(BYTE_FALLBACK, 0) and not known.issuperset([SPACE, *"".join(classes)]):
        return None
    named = [re.escape(members) for members in classes]
    return re.compile(f" *(?:{''.join(f'[{members}]+|' for members in named)}[^ {''.join(named)}]+)| +")


def _classes(pieces: Iterable[str]) -> list[str] | None:
    """Characters that any chain of pieces connects, most first; None if a piece has a space after something else."""
    parent: dict[str, str] = {}

    def root(character: str) -> str:
        while parent.setdefault(character, character) != character:
            character = parent[character]
        return character

    for piece in pieces:
        for left, right in pairwise(piece):
            if right == SPACE and left != SPACE:
                return None
            if left != SPACE:
                parent[root(left)] = root(right)
    members: dict[str, list[str]] = {}
    for character in parent:
        members.setdefault(root(character), []).append(character)
    # To lay classes together, as is done with what is left over here, is always right.
    return ["".join(sorted(found)) for found in sorted(members.values(), key=len, reverse=True)[:MOST_CLASSES]]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in the wire format of protocol buffers: number, and an integer or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield number, message[at : at + size]
            at += size
