"""Beginnings of prompts whose slots are kept, so that prompts that begin alike are computed once."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class StoredPrefix(NamedTuple):
    """A prompt that was read.

    Attributes:
        tokens: int64 (L,).
        executed: K̂ of each.
        slots: that are kept for them.
    """

    tokens: np.ndarray
    executed: list[int]
    slots: int


class Match(NamedTuple):
    """What a prompt shares with a stored one.

    Attributes:
        key: of the stored prompt.
        executed: K̂ of the tokens shared.
        slots: of these tokens.
    """

    key: int
    executed: list[int]
    slots: int


class Prefixes:
    """Which prompts are kept, up to a number of slots; the one not used for longest goes first."""

    def __init__(self, max_slots: int, shortest: int, slots: Callable[[Sequence[int]], int]) -> None:
        """Keep none yet.

        Args:
            max_slots: of all together; 0 to keep none.
            shortest: tokens from which on sharing is worth it.
            slots: how many a cache keeps of tokens, by K̂ of each.
        """
        self._slots = slots
        self._max_slots, self.shortest = max_slots, shortest
        self._stored: OrderedDict[int, StoredPrefix] = OrderedDict()
        self._keys = itertools.count()

    def match(self, tokens: np.ndarray) -> Match | None:
        """The stored prompt that shares most with this one, but for its last token, which has to run."""
        shared = {key: shared_tokens(stored.tokens, tokens[:-1]) for key, stored in self._stored.items()}
        key = max(shared, key=shared.__getitem__, default=None)
        if key is None or shared[key] < self.shortest:
            return None
        self._stored.move_to_end(key)
        executed = self._stored[key].executed[: shared[key]]
        return Match(key, executed, self._slots(executed))

    def store(self, tokens: np.ndarray, executed: Sequence[int]) -> tuple[int | None, list[int]]:
        """Decide whether to keep a prompt that was just read.

        Returns:
            Its key, or None if it is not worth keeping; keys of others that go.
        """
        slots = self._slots(executed)
        known = any(shared_tokens(stored.tokens, tokens) == len(tokens) for stored in self._stored.values())
        if known or slots > self._max_slots or len(tokens) < self.shortest:
            return None, []
        key, dropped = next(self._keys), []
        self._stored[key] = StoredPrefix(tokens, list(executed), slots)
        while sum(stored.slots for stored in self._stored.values()) > self._max_slots:
            dropped.append(self._stored.popitem(last=False)[0])
        return key, dropped


def shared_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that two sequences have in common at their beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
