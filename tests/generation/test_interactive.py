"""Prompts that are typed one after another."""

import io
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.generation import interactive
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.interactive import converse
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.shading import ShadedPrinter
from tests.models import small_model


@pytest.fixture
def talk(corpus):
    """Holds a conversation on a terminal: what was printed, without styles."""

    def talk(ask, max_new_tokens: int = 6) -> str:
        tokenizer = load_tokenizer(corpus.tokenizer)
        model = small_model(router_scale=3.0, model__vocab_size=512, model__max_position_embeddings=4096)
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system=None, soft_wrap=True, highlight=False)
        with Generator(model, tokenizer=tokenizer) as generator:
            converse(generator, Options(max_new_tokens=max_new_tokens), tokenizer, console, ask)
            assert generator.idle
            assert generator.cached_slots == 0
        return out.getvalue()

    return talk


def typed(*lines: str):
    """Gives lines, then says that there are no more."""
    left = iter(lines)

    def ask() -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    return ask


def test_answers_follow_each_other_and_mistakes_end_nothing(talk):
    printed = talk(typed("import os", "", "word " * 9000, "import os"))
    first, second = (part.partition("6 tokens in")[0] for part in printed.split("import os")[1:])
    assert first
    assert second == first
    assert printed.startswith("latent steps:  0  1  2  3  4 or more   Control-C stops a text, Control-D ends")
    assert printed.count("the model is meant for 4096; shorten the prompt or ask for fewer") == 1


def test_control_c_stops_a_text_and_no_more(talk, monkeypatch):
    call, tokens = ShadedPrinter.__call__, []

    def interrupting(printer, index, generation):
        tokens.append(len(generation.tokens))
        call(printer, index, generation)
        if len(tokens) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShadedPrinter, "__call__", interrupting)
    before = signal.getsignal(signal.SIGINT)
    printed = talk(typed("import os", "class"), max_new_tokens=40)
    assert signal.getsignal(signal.SIGINT) is before
    assert "5 tokens in" in printed
    assert "40 tokens in" in printed


def test_control_c_at_the_prompt_ends_all(talk):
    def ask():
        raise KeyboardInterrupt

    assert "tokens in" not in talk(ask)


def test_other_ranks_hear_from_this_one_while_nobody_types(talk, monkeypatch):
    beats, keep_alive = [], Generator.keep_alive

    def counted(generator):
        beats.append(threading.current_thread().name)
        keep_alive(generator)

    monkeypatch.setattr(Generator, "keep_alive", counted)
    monkeypatch.setattr(interactive, "SECONDS_BETWEEN_BEATS", 0.01)
    lines = iter(["import os", None])

    def ask():
        waited = len(beats)
        while len(beats) < waited + 3:
            time.sleep(0.01)
        line = next(lines)
        if line is None:
            raise EOFError
        return line

    assert "6 tokens in" in talk(ask)
    assert set(beats) == {"keep alive"}
    assert not [thread for thread in threading.enumerate() if thread.name == "keep alive"]
