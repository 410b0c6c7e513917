"""A loop of prompts on a terminal, or of lines through a pipe."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.text import Text

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import decode, open_standard_input
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.generate import complete
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.interrupts import noted_signals
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.prompts import Prompt, Task, tasks_of
from megatron_ponder.generation.shading import SHADES, ShadedPrinter
from megatron_ponder.generation.totals import Totals

SECONDS_BETWEEN_BEATS = 60.0


def converse(
    generator: Generator, options: Options, tokenizer: Tokenizer, console: Console, ask: Callable[[], str]
) -> None:
    """Continue one prompt after another, each as it is typed, until there are no more.

    On a terminal tokens are shaded by their steps. Control-C ends what is being generated; at the prompt it ends all.

    Args:
        generator: whose block has been entered.
        options: of every prompt.
        tokenizer: of the model.
        console: to print to.
        ask: gives the next prompt; raises EOFError when there is none, UserError if it is no text.
    """
    if console.is_terminal:
        console.print(_legend(), end="\n\n")
    while True:
        try:
            with _kept_alive(generator):
                text = ask()
            if not text:
                continue
            tasks = tasks_of([Prompt(text, options, "")], tokenizer, generator.check)
        except (EOFError, KeyboardInterrupt):
            return
        except UserError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            continue
        totals = _answer(generator, tasks, ShadedPrinter(console, tokenizer, stream=True))
        console.print(totals, style="dim", highlight=False, end="\n\n")


def line_source(console: Console) -> Callable[[], str]:
    """Asks for a line: on a terminal with a mark and line editing, elsewhere without."""
    if sys.stdin is None or not sys.stdin.isatty():
        lines = open_standard_input()

        def read() -> str:
            line = lines.readline()
            if not line:
                raise EOFError
            return decode(line, "the line").removesuffix("\n")

        return read
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` its line editing
    return lambda: console.input("[bold]> [/]")


def _answer(generator: Generator, tasks: list[Task], printer: ShadedPrinter) -> str:
    """Print continuations as they come; what they have cost."""
    totals, before, begun = Totals(), Totals(), time.perf_counter()
    before.observe(generator)
    requests = ((index, task.request) for index, task in enumerate(tasks))
    with noted_signals() as stop:
        for _, generation in complete(generator, requests, printer, stop.is_set):
            totals.add(generation)
    totals.observe(generator)
    return (totals - before).closing_line(time.perf_counter() - begun)


@contextmanager
def _kept_alive(generator: Generator) -> Iterator[None]:
    """Let the other ranks hear from this one now and then, while it waits for a person."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(SECONDS_BETWEEN_BEATS):
            generator.keep_alive()

    thread = threading.Thread(target=beat, name="keep alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _legend() -> Text:
    legend = Text("latent steps: ", style="dim")
    for count, style in enumerate(SHADES):
        last = count == len(SHADES) - 1
        legend.append(f" {count}{' or more' if last else ''} ", style=style)
    return legend.append("  Control-C stops a text, Control-D ends", style="dim")
