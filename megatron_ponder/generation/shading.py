"""Texts in which every token is shaded by the latent steps that were run for it."""

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.request import Generation
from megatron_ponder.generation.text_stream import TextStream

# From no steps to many; background shades that stay readable on dark and light terminals.
SHADES = ("", "black on #e8eef9", "black on #bcd0f5", "black on #7fa6ee", "white on #2f5fc4")


def shade(steps: int) -> str:
    """The style of a token that took so many latent steps."""
    return SHADES[min(steps, len(SHADES) - 1)]


class ShadedText:
    """Prompt and continuation as they come, cut into pieces of one token each.

    The steps of a token are known once the model has been fed it, which is when the next token comes. A token that is
    only a part of a character gives no piece of its own.
    """

    def __init__(self, tokenizer: Tokenizer, generation: Generation, with_prompt: bool = True) -> None:
        """Begin before the first token of the generation, or before its continuation."""
        self._generation = generation
        self._streams = [TextStream(tokenizer, []), TextStream(tokenizer, generation.prompt)]
        self._ends: list[list[int]] = [[], []]
        self._next, self._written = [0, 0], [0, 0]
        prompt = self._streams[0]
        for token in generation.prompt if with_prompt else ():
            prompt.add(token)
            self._ends[0].append(len(prompt.text))
        prompt.close()

    def advance(self, wait_for_steps: bool) -> list[tuple[str, int]]:
        """New pieces, each with its steps.

        Args:
            wait_for_steps: leave out tokens whose steps are not known yet; else these have 0.
        """
        generation, continuation = self._generation, self._streams[1]
        for token in generation.tokens[len(self._ends[1]) :]:
            continuation.add(token)
            self._ends[1].append(len(continuation.text))
        ended = generation.finish_reason is not None
        if ended:
            continuation.close()
        steps = generation.executed_steps
        prompt_steps, own_steps = steps[: len(generation.prompt)], steps[len(generation.prompt) :]
        if not ended and wait_for_steps and len(prompt_steps) < len(generation.prompt):
            return []
        # What is sure of the continuation; the scheduler holds back what may become a stop string.
        texts = self._streams[0].text, continuation.text[: len(generation.text)]
        everything = ended or not wait_for_steps
        return self._pieces(0, texts[0], prompt_steps, True) + self._pieces(1, texts[1], own_steps, everything)

    def _pieces(self, part: int, text: str, steps: list[int], everything: bool) -> list[tuple[str, int]]:
        """Pieces of the prompt (0) or of the continuation (1), from the first that was not whole before."""
        pieces, ends = [], self._ends[part]
        while self._next[part] < len(ends) and (everything or self._next[part] < len(steps)):
            token = self._next[part]
            end = min(ends[token], len(text))
            if end > self._written[part]:
                pieces.append((text[self._written[part] : end], steps[token] if token < len(steps) else 0))
                self._written[part] = end
            if end < ends[token]:
                return pieces
            self._next[part] += 1
        if everything and len(text) > self._written[part]:  # a character that was never finished
            pieces.append((text[self._written[part] :], 0))
            self._written[part] = len(text)
        return pieces


class ShadedPrinter:
    """Prints sequences one after another in the order of their indices, each whole or while it comes.

    On a terminal tokens are shaded; elsewhere the text is plain.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Tokenizer,
        stream: bool,
        with_prompt: bool = True,
        after: Callable[[Generation], Text] | None = None,
    ) -> None:
        """Begin with sequence 0.

        Args:
            console: to print to.
            tokenizer: of the model.
            stream: print tokens as they come; else each sequence once it has ended.
            with_prompt: print the prompt too.
            after: what to print below a sequence.
        """
        self._console, self._tokenizer = console, tokenizer
        self._stream, self._with_prompt, self._after = stream, with_prompt, after
        self._turn = 0
        self._shaded: ShadedText | None = None
        self._known: dict[int, Generation] = {}

    def __call__(self, index: int, generation: Generation) -> None:
        """Take note of a sequence that has a new token, or has ended."""
        self._known[index] = generation
        while (now := self._known.get(self._turn)) is not None:
            if now.finish_reason is None and not self._stream:
                return
            self._print(now)
            if now.finish_reason is None:
                return
            self._console.print()
            if now.error:
                self._console.print(f"failed: {now.error}", style="red", markup=False, highlight=False)
            if self._after is not None:
                self._console.print(self._after(now), end="\n\n")
            del self._known[self._turn]
            self._turn, self._shaded = self._turn + 1, None

    def _print(self, generation: Generation) -> None:
        if self._shaded is None:
            self._shaded = ShadedText(self._tokenizer, generation, self._with_prompt)
        pieces = self._shaded.advance(wait_for_steps=self._console.is_terminal)
        if self._console.is_terminal:
            text = Text.assemble(*((piece, shade(steps)) for piece, steps in pieces))
            self._console.print(text, end="")
        else:  # as it is: rich would replace tabs
            self._console.file.write("".join(piece for piece, _ in pieces))
        self._console.file.flush()


def steps_line(generation: Generation, tokenizer: Tokenizer) -> Text:
    """Every token that the model was fed, in printable form, with its latent steps."""
    ids = (generation.prompt + generation.tokens)[: len(generation.executed_steps)]
    pairs = zip(ids, generation.executed_steps, strict=True)
    words = (f"{tokenizer.piece(token)!r}:{steps}" for token, steps in pairs)
    return Text("latent steps: " + " ".join(words), style="dim")
