"""Text of a sequence while its tokens come in."""

from collections.abc import Sequence

from megatron_ponder.data.tokenizer import Tokenizer

# Tokens before the newest that may change how it is written: a space at the beginning, a character of several tokens.
CONTEXT = 6
UNFINISHED = "\ufffd"


class TextStream:
    """Decodes token by token and looks for strings that end the text.

    Attributes:
        text: all that is sure: no unfinished character at its end, and nothing that may become a stop string.
        stopped: whether a stop string has occurred; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._ids = list(prompt[-CONTEXT:])
        self._decoded = tokenizer.decode(self._ids).rstrip(UNFINISHED)
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> None:
        """Append a token."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids)
        if decoded.endswith(UNFINISHED):
            return
        self._append(decoded[len(self._decoded) :])
        self._ids = self._ids[-CONTEXT:]
        self._decoded = self._tokenizer.decode(self._ids)

    def close(self) -> None:
        """End, after which what was held back is text after all."""
        if not self.stopped:
            self._append(self._tokenizer.decode(self._ids)[len(self._decoded) :])
            if not self.stopped:
                self.text, self._held = self.text + self._held, ""

    def _append(self, new: str) -> None:
        self._held += new
        places = [place for stop in self._stop_strings if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            self.text, self._held = self.text + self._held[: min(places)], ""
            return
        kept = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        sure = len(self._held) - kept
        self.text, self._held = self.text + self._held[:sure], self._held[sure:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
