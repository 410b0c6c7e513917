"""Texts shaded by steps, as they come and as a whole."""

import io

import pytest
from rich.console import Console
from rich.style import Style

from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Generation, Request
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.generation.shading import SHADES, ShadedPrinter, ShadedText, shade, steps_line
from tests.models import small_model

PROMPTS = ["def f(x):\n    ", "naïve ☕", ""]


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus.tokenizer)


def generator_with(tokenizer) -> Generator:
    """Its tokens take all numbers of steps, and many are parts of characters."""
    model = small_model(router_scale=3.0, model__vocab_size=512, inference__threshold=0.2, ponder__latent_steps=3)
    return Generator(model, tokenizer=tokenizer)


def requests(tokenizer) -> list[Request]:
    prompts = [tuple(tokenizer.encode(text) or [tokenizer.eod_id]) for text in PROMPTS]
    hot = Sampling(temperature=1.0, seed=3)
    return [Request(prompt, 30, hot, stop_strings=stop) for prompt in prompts for stop in ((), ("e", "x"))]


@pytest.mark.parametrize("wait_for_steps", [True, False])
def test_pieces_add_up_to_the_text(tokenizer, wait_for_steps):
    with generator_with(tokenizer) as generator:
        for request in requests(tokenizer):
            pieces, shaded, counts = [], [], []

            def note(generation, pieces=pieces, shaded=shaded, counts=counts):
                if not shaded:
                    shaded.append(ShadedText(tokenizer, generation))
                pieces.extend(shaded[0].advance(wait_for_steps))
                counts.append(len(pieces))

            generation = generator.submit(request, note).generation
            generator.run()
            text = "".join(piece for piece, _ in pieces)
            assert text == tokenizer.decode(list(request.prompt)) + generation.text
            assert len(counts) > 1
            assert counts[0] < counts[-1] or not generation.text
            if wait_for_steps:
                whole = ShadedText(tokenizer, generation).advance(wait_for_steps=True)
                assert pieces == whole
                assert {steps for _, steps in pieces} <= set(generation.executed_steps) | {0}


def test_every_token_has_its_own_steps(tokenizer):
    prompt = tokenizer.encode("import os")
    new = tokenizer.encode("def main")
    generation = Generation(prompt, new, executed_steps=list(range(len(prompt) + len(new) - 1)))
    generation.text = tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]
    generation.finish_reason = "length"
    pieces = ShadedText(tokenizer, generation).advance(wait_for_steps=True)
    assert [steps for _, steps in pieces] == [*generation.executed_steps, 0]
    assert pieces[0][0] == tokenizer.decode(prompt[:1])
    only = ShadedText(tokenizer, generation, with_prompt=False).advance(wait_for_steps=True)
    assert only == pieces[len(prompt) :]
    words = steps_line(generation, tokenizer).plain.split()
    assert words[2:] == [f"{tokenizer.piece(token)!r}:{steps}" for steps, token in enumerate((prompt + new)[:-1])]


def test_shades():
    assert [shade(steps) for steps in (0, 1, 4, 9)] == [SHADES[0], SHADES[1], SHADES[4], SHADES[4]]
    assert all(Style.parse(style).bgcolor is not None for style in SHADES[1:])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_sequences_are_printed_one_after_another(tokenizer, stream, terminal):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, soft_wrap=True, highlight=False, color_system="auto" if terminal else None
    )
    printer = ShadedPrinter(console, tokenizer, stream)
    with generator_with(tokenizer) as generator:
        sequences = [
            generator.submit(request, lambda generation, index=index: printer(index, generation))
            for index, request in enumerate(requests(tokenizer))
        ]
        generator.run()
    printed = out.getvalue()
    assert ("\x1b[" in printed) == terminal
    if not terminal:
        texts = [tokenizer.decode(sequence.generation.prompt) + sequence.generation.text for sequence in sequences]
        assert printed == "".join(f"{text}\n" for text in texts)  # as it is, tabs and control characters too
