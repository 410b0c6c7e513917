"""Prompts from command lines, pipes and files, and what is told about those that cannot be."""

import io
import json
import math
import re
from dataclasses import fields

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import range_of
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.generation.loading import Setup
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.prompts import Prompt, read_prompts, tasks_of, text_prompts
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.generation.scheduler import Scheduler
from megatron_ponder.generation.sequences import Batching
from tests import REPOSITORY
from tests.models import small_config

DEFAULTS = Options(max_new_tokens=5, temperature=0.5, stop=("\n",), seed=3)


@pytest.fixture
def written(tmp_path):
    """Writes a file of lines."""

    def written(*lines: object):
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "prompts.jsonl").write_text("\n".join(text), encoding="utf-8")
        return tmp_path / "prompts.jsonl"

    return written


def test_a_line_may_say_anything_that_the_command_line_may(written):
    own = {
        "max_new_tokens": 9,
        "samples": 2,
        "temperature": 1,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 8,
        "stop": ["a", "b"],
        "stop_tokens": [4, 5],
        "ignore_eod": True,
        "top_log_probabilities": 2,
    }
    assert own.keys() == {field.name for field in fields(Options)}
    file = written(
        '"text"', "", [1, 2], {"prompt": "naïve ☕", "id": {"n": 1}}, "  ", {"prompt": [3], "seed": None} | own
    )
    text, ids, kept, full = read_prompts(file, DEFAULTS)
    assert text == Prompt("text", DEFAULTS, f"{file} line 1")
    assert ids == Prompt((1, 2), DEFAULTS, f"{file} line 3")
    assert (kept.content, kept.options, kept.id) == ("naïve ☕", DEFAULTS, {"n": 1})
    assert full.where == f"{file} line 6"
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    assert full.options == Options(**values)
    assert read_prompts(written({"prompt": "a", "stop": "b", "seed": None}), DEFAULTS)[0].options == Options(
        max_new_tokens=5, temperature=0.5, stop=("b",), seed=3
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1000 is not JSON \(.*\); write an object such as"),
        ("7", "line 1000 has no prompt; give a text or a list of token ids"),
        ({"text": "a"}, "line 1000 has no prompt"),
        ({"prompt": [1, "a"]}, "line 1000 has no prompt"),
        ({"prompt": [True]}, "line 1000 has no prompt"),
        ({"prompt": []}, "line 1000: the prompt is empty; give at least one token"),
        (
            {"prompt": "a", "temprature": 1},
            "line 1000: there is no option 'temprature'; choose among max_new_tokens, sam",
        ),
        ({"prompt": "a", "temperature": "hot"}, 'line 1000: temperature must be a number, not "hot"'),
        ({"prompt": "a", "temperature": -1}, "line 1000: temperature is -1; its range is 0, or 1e-6 to 100"),
        ({"prompt": "a", "top_k": 1.5}, "line 1000: top_k must be a whole number, not 1.5"),
        ({"prompt": "a", "top_k": True}, "line 1000: top_k must be a whole number, not true"),
        ({"prompt": "a", "ignore_eod": 1}, "line 1000: ignore_eod must be true or false, not 1"),
        ({"prompt": "a", "stop": [1]}, r"line 1000: stop must be a text or a list of texts, not \[1\]"),
        ({"prompt": "a", "stop": ""}, "line 1000: a stop string is empty"),
        ({"prompt": "a", "stop_tokens": 4}, "line 1000: stop_tokens must be a list of token ids, not 4"),
        ({"prompt": "a", "samples": 0}, "line 1000: samples is 0; its range is 1 to 10,000"),
        ({"prompt": "a", "seed": -1}, "line 1000: seed is -1; its range is 0 to 9,223,372,036,854,775,807"),
    ],
    ids=str,
)
def test_a_bad_line_among_many_is_named(written, line, message):
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(written(*[{"prompt": "good"}] * 999, line, {"prompt": "good"}), DEFAULTS)
    assert "\n" not in str(caught.value)


def test_all_bad_lines_are_counted(written):
    with pytest.raises(UserError, match=r"line 2 has no prompt.* \(2 more prompts are refused too\)$"):
        read_prompts(written('"a"', "3", "4", "{"), DEFAULTS)


def test_files_that_cannot_be_read(written, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "missing", DEFAULTS)
    with pytest.raises(UserError, match="has no prompts; write one JSON object a line"):
        read_prompts(written("", " "), DEFAULTS)
    file = written('"a"')
    file.write_bytes(b'"good"\n"\xff"\n')
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 text \(invalid start byte at byte 1\)"):
        read_prompts(file, DEFAULTS)


def test_a_mark_of_byte_order_is_no_text(written, monkeypatch):
    file = written()
    file.write_bytes(b'\xef\xbb\xbf"good"\n"a"\n')
    assert [prompt.content for prompt in read_prompts(file, DEFAULTS)] == ["good", "a"]
    monkeypatch.setattr("sys.stdin", piped(b"\xef\xbb\xbfgood\n"))
    assert text_prompts(["-"], DEFAULTS)[0].content == "good"


@pytest.mark.parametrize(
    "line",
    [
        r'"\ud800"',
        r'{"prompt": "a", "id": "\ud800"}',
        r'{"prompt": "a", "id": {"\ud800": 1}}',
        r'{"prompt": "a", "stop": "\ud800"}',
        r'{"prompt": "a", "stop": ["b", "\ud800"]}',
    ],
)
def test_half_a_surrogate_pair_is_refused_before_any_work(written, line):
    with pytest.raises(UserError, match=r"line 2 has half a surrogate pair \(\\ud800\), which is no character"):
        read_prompts(written('"good"', line), DEFAULTS)


def test_a_line_that_is_nested_too_deeply(written):
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_prompts(written("[" * 100_000), DEFAULTS)


def piped(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content))


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", piped("def f():\n    ☕\n\n".encode()))
    first, second = text_prompts(["a", "-"], DEFAULTS)
    assert (first.content, second.content, second.where) == ("a", "def f():\n    ☕\n", "standard input")
    monkeypatch.setattr("sys.stdin", piped(b'"a"\n[4]\n'))
    assert [prompt.content for prompt in read_prompts("-", DEFAULTS)] == ["a", (4,)]
    monkeypatch.setattr("sys.stdin", piped(b""))
    with pytest.raises(UserError, match="standard input is empty; give --prompt or --prompts-file"):
        text_prompts(["-"], DEFAULTS)
    monkeypatch.setattr("sys.stdin", piped(b"\xff"))
    with pytest.raises(UserError, match="standard input is not UTF-8 text"):
        text_prompts(["-"], DEFAULTS)


def scheduler(tokenizer, **batching):
    config = small_config(model__vocab_size=512)
    return Scheduler(config.model, config.ponder, Batching(**batching), tokenizer)


def test_tasks(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    options = Options(max_new_tokens=4, samples=2, temperature=1, seed=(1 << 63) - 1, stop_tokens=(7,))
    prompts = [
        Prompt("import", options, "one", "x"),
        Prompt((1, 2), Options(max_new_tokens=1, ignore_eod=True), ""),
        Prompt("", options, ""),
    ]
    tasks = tasks_of(prompts, tokenizer, scheduler(tokenizer, max_slots=2000).check)
    assert [(task.prompt, task.sample, task.id) for task in tasks] == [
        (0, 0, "x"), (0, 1, "x"), (1, 0, None), (2, 0, None), (2, 1, None),
    ]  # fmt: skip
    assert [task.request.sampling.seed for task in tasks] == [(1 << 63) - 1, 0, 0, (1 << 63) - 1, 0]
    assert tasks[0].request.prompt == tuple(tokenizer.encode("import"))
    assert tasks[0].request.stop_ids == {7, tokenizer.eod_id}
    assert (tasks[2].request.prompt, tasks[2].request.stop_ids, tasks[2].request.sampling) == (
        (1, 2),
        set(),
        Sampling(),
    )
    assert tasks[3].request.prompt == (tokenizer.eod_id,)


def test_tasks_that_cannot_be(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    good = Prompt("a", Options(max_new_tokens=1), "prompt 0")

    def message(prompt, tokenizer=tokenizer, **batching):
        with pytest.raises(UserError) as caught:
            tasks_of([good, prompt, good] if tokenizer else [prompt], tokenizer, scheduler(tokenizer, **batching).check)
        return str(caught.value)

    too_long = message(Prompt("a" * 999, Options(), "prompt 1"))
    assert too_long.startswith("prompt 1: the prompt has ")
    assert too_long.endswith("the model is meant for 64; shorten the prompt or ask for fewer")
    assert "prompt 1: token" not in too_long
    assert message(Prompt((512,), Options(max_new_tokens=1), "")).startswith(
        "the prompt has token ids outside of 0 to 511"
    )
    assert "may need 15 slots, but the cache is limited to 9" in message(
        Prompt((1,), Options(max_new_tokens=4), ""), max_slots=9
    )
    assert "the checkpoint has no tokenizer; train with tokenizer.path set" in message(good, None)
    assert "the prompt has half a surrogate pair" in message(Prompt("a\ud800", Options(max_new_tokens=1), "prompt 1"))
    assert "stop strings need a tokenizer" in message(Prompt((1,), Options(max_new_tokens=1, stop=("a",)), ""), None)


def test_every_number_has_a_range(written):
    """So that a file of prompts cannot say what no continuation survives, however large, small or odd it is."""
    for field in fields(Options):
        if field.type in (int, float, tuple[int, ...]):
            declared = field.metadata["range"]
            assert declared.low <= declared.high < math.inf
            for value in ("NaN", "Infinity", "-Infinity", f"1{400 * '0'}", "1e999", "-1"):
                value = value if field.type in (int, float) else f"[{value}]"
                with pytest.raises(UserError, match=f"line 1: {field.name} (is|must be)"):
                    read_prompts(written(f'{{"prompt": "a", "{field.name}": {value}}}'), DEFAULTS)


def test_the_page_has_the_range_of_every_option():
    page = (REPOSITORY / "docs" / "inference.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| `--([\w-]+)` \| [^|]+ \| *([^|]*?) *\|", page))
    for kind in (Options, Prefill, Batching, Setup):
        for field in fields(kind):
            name = field.name.replace("_", "-")
            if range_of(field) is not None and name in rows:
                assert rows[name] == str(range_of(field)), name
    assert {field.name.replace("_", "-") for field in fields(Options)} <= rows.keys()
