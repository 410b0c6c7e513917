"""In which turn several sources are drawn from, so that each has its share at every moment."""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from heapq import heappop, heappush, heapreplace
from math import gcd, lcm
from typing import NamedTuple

import numpy as np

DRAWS_AT_ONCE = 1 << 16
STRETCHES_KEPT = 4


class _Stretch(NamedTuple):
    """For `DRAWS_AT_ONCE` draws or the rest of a period: which source (n,), and how often it was drawn before (n,)."""

    sources: np.ndarray
    before: np.ndarray


class Interleave:
    """A fixed order of draws in which each source is never a whole draw behind its share, nor a whole one ahead.

    After n draws source i has been drawn more than n·w_i - 1 and less than n·w_i + 1 times, where w_i is its weight
    over the sum of all, exactly as the decimal numbers say. Draw j of source i may come from n = (j - 1) / w_i on and
    is due by n = j / w_i; of those that may come, the one due first is taken. A stretch of n draws can contain at most
    n whole windows of this kind, so that none is ever late, and there is always one that may come.

    The order repeats itself after the least number of draws in which every share is whole. Finding draw n costs a
    microsecond for each of the first n draws of that period, once, and no memory to speak of.

    Args:
        weights: positive, one of each source.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # The number that the user wrote: 0.1, not its binary neighbour.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        denominator = lcm(*(weight.denominator for weight in exact))
        parts = [int(weight * denominator) for weight in exact]
        divisor = gcd(*parts)
        self.parts = [part // divisor for part in parts]
        self.period = sum(self.parts)
        # Draws of each source before each stretch of a period, as far as they are known.
        self._starts: list[list[int]] = [[0] * len(parts)]
        self._stretches: OrderedDict[int, _Stretch] = OrderedDict()

    @property
    def shares(self) -> list[Fraction]:
        """w_i of each source; their sum is 1."""
        return [Fraction(part, self.period) for part in self.parts]

    def locate(self, draw: int) -> tuple[int, int]:
        """The source of a draw, and how many draws of that source come before."""
        period, place = divmod(draw, self.period)
        number, place = divmod(place, DRAWS_AT_ONCE)
        stretch = self._stretch(number)
        source = int(stretch.sources[place])
        return source, period * self.parts[source] + int(stretch.before[place])

    def counts(self, draws: int) -> list[int]:
        """How often each source is among the first `draws` draws."""
        period, place = divmod(draws, self.period)
        number, place = divmod(place, DRAWS_AT_ONCE)
        inside = np.bincount(self._stretch(number).sources[:place], minlength=len(self.parts))
        return [
            period * part + start + int(more)
            for part, start, more in zip(self.parts, self._starts[number], inside, strict=True)
        ]

    def _stretch(self, number: int) -> _Stretch:
        if number not in self._stretches:
            for missing in range(min(number, len(self._starts) - 1), number + 1):
                stretch = self._draw(missing)
                if missing + 1 == len(self._starts):
                    drawn = np.bincount(stretch.sources, minlength=len(self.parts)).tolist()
                    self._starts.append([a + b for a, b in zip(self._starts[missing], drawn, strict=True)])
            self._stretches[number] = stretch
            if len(self._stretches) > STRETCHES_KEPT:
                self._stretches.popitem(last=False)
        return self._stretches[number]

    def _draw(self, number: int) -> _Stretch:
        """Draw by draw, from the state at the start of the stretch."""
        parts, period = self.parts, self.period
        counts = list(self._starts[number])
        first = number * DRAWS_AT_ONCE
        size = min(DRAWS_AT_ONCE, period - first)
        sources = np.empty(size, np.int32)
        before = np.empty(size, np.int64)
        waiting: list[tuple[int, int]] = []  # (draw from which on it may come, source)
        for source, (count, part) in enumerate(zip(counts, parts, strict=True)):
            heappush(waiting, (count * period // part, source))
        ready: list[tuple[int, int]] = []  # (draws by which it is due, source)
        for place in range(size):
            while waiting and waiting[0][0] <= first + place:
                source = heappop(waiting)[1]
                heappush(ready, (-(-(counts[source] + 1) * period // parts[source]), source))
            source = ready[0][1]
            count = counts[source]
            sources[place], before[place] = source, count
            counts[source] = count = count + 1
            release = count * period // parts[source]
            if release <= first + place + 1:
                heapreplace(ready, (-(-(count + 1) * period // parts[source]), source))
            else:
                heappop(ready)
                heappush(waiting, (release, source))
        return _Stretch(sources, before)
