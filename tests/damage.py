"""Damage that is drawn at random, to bytes and to what a JSON file says; and a disk that is full."""

import copy
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager

NONSENSE = (None, True, -1, 0, 1, 2**70, 0.5, float("nan"), 1e308, "", "../x", "/etc/passwd", "a\n\0", "\ud800", [], {})


def draws(seed: int, tries: int) -> Iterator[tuple[str, random.Random]]:
    """A name for each try, for the message if it fails, and the draw that repeats it."""
    for number in range(tries):
        name = f"seed {seed}, try {number}"
        yield name, random.Random(name)


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes, with flipped bits, cut off, or with a piece overwritten, removed, repeated or put in."""
    at = draw.randrange(len(content) + 1)
    end = min(len(content), at + draw.randint(1, 40))
    match draw.randrange(6):
        case 0:
            flipped = bytearray(content)
            for _ in range(draw.choice((1, 1, 1, 2, 8))):
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:at]
        case 2:
            return content[:at] + draw.randbytes(end - at) + content[end:]
        case 3:
            return content[:at] + content[end:]
        case 4:
            return content[:end] + content[at:]
        case _:
            return content[:at] + draw.choice((b"\0", b"\xff", b"[", b'"', b"9" * 5000, b"{" * 5000)) + content[at:]


def changed_fields(content: dict, draw: random.Random) -> dict:
    """What a JSON file says, with one entry at any depth removed, renamed, repeated elsewhere, or nonsense."""
    content = copy.deepcopy(content)
    inside, key = draw.choice(list(_places(content)))
    match draw.randrange(4):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[draw.choice(("x", "../x", "", key.upper(), f"{key}/.."))] = inside.pop(key)
        case 2:
            other, place = draw.choice(list(_places(content)))
            inside[key] = copy.deepcopy(other[place])
        case _:
            inside[key] = draw.choice(NONSENSE)
    return content


def _places(content: dict | list) -> Iterator[tuple[dict | list, str | int]]:
    """Every entry at any depth: what it lies in, and its key."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """Within the block files can be made, and only so many bytes be written to each of them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # Python ignores the signal, so that writing fails
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
