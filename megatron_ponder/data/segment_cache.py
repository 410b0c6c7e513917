"""Text to token ids at the speed of a look-up, where a tokenizer encodes the same words again and again."""

import numpy as np

from megatron_ponder.data.tokenizer import Tokenizer

# With the lengths below, some 50 MB at most; a corpus of any size needs the same few words most of the time.
PARTS_KEPT = 1 << 18
LONGEST_PART_KEPT = 64


class CachedEncoder:
    """Encodes like the tokenizer, token for token, and remembers the parts that may be encoded by themselves.

    Tokenizers without a rule for such parts (`separable` is None) are asked each time.

    Args:
        tokenizer: what to encode with.
        dtype: of the ids.

    Attributes:
        tokenizer: the same.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer = tokenizer
        self._dtype = np.dtype(dtype)
        self._separable = tokenizer.separable
        self._parts = _Parts(self._plain)

    def encode(self, text: str) -> bytes:
        """The ids of `tokenizer.encode(text)`, one after another in the dtype."""
        if self._separable is None:
            return self._plain(text)
        return b"".join(map(self._parts.__getitem__, self._separable.findall(text)))

    @property
    def misses(self) -> int:
        """Parts that had to be encoded so far."""
        return self._parts.misses

    def _plain(self, text: str) -> bytes:
        return np.array(self.tokenizer.encode(text), self._dtype).tobytes()


class _Parts(dict[str, bytes]):
    """Ids by part of a text; what is absent is encoded, and kept within bounds."""

    def __init__(self, encode) -> None:
        super().__init__()
        self.misses = 0
        self._encode = encode

    def __missing__(self, part: str) -> bytes:
        self.misses += 1
        ids = self._encode(part)
        if len(part) <= LONGEST_PART_KEPT:
            # To begin anew takes no time beside encoding that many, and no bookkeeping at each look-up.
            if len(self) >= PARTS_KEPT:
                self.clear()
            self[part] = ids
        return ids
