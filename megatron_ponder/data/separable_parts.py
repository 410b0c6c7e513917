"""Where a text may be cut so that its parts have the same tokens as the whole, read from a SentencePiece model."""

import re
from collections.abc import Iterable
from itertools import pairwise

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

# What SentencePiece writes in pieces for a space.
SPACE = "\u2581"
# A class of characters costs time at each part; what lies in smaller ones is not worth it.
MOST_CLASSES = 6
Piece = ModelProto.SentencePiece


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
    content = ModelProto.FromString(model)
    trainer, normalizer = content.trainer_spec, content.normalizer_spec
    changes_text = (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or trainer.treat_whitespace_as_suffix
    )
    if trainer.model_type != TrainerSpec.BPE or changes_text:
        return None
    by_type: dict[int, list[str]] = {}
    for piece in content.pieces:
        by_type.setdefault(piece.type, []).append(piece.piece)
    pieces = [*by_type.get(Piece.NORMAL, ()), *by_type.get(Piece.UNUSED, ())]
    # No text has a piece with a plain space in it, as the text has the other character there by then.
    classes = _classes(piece for piece in pieces if " " not in piece)
    if Piece.USER_DEFINED in by_type or classes is None:
        return None
    # Without bytes, unknown characters beside each other become one token, and so must not be cut apart: all of them
    # have to lie in the last class.
    known = set(by_type.get(Piece.NORMAL, ()))
    if not trainer.byte_fallback and not known.issuperset([SPACE, *"".join(classes)]):
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
