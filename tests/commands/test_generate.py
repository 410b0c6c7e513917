import io
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.generation.results import ResultWriter
from tests.conftest import Ended
from tests.finished_runs import LATEST, finished_runs
from tests.models import small_config, small_model
from tests.processes import Forked, environments

PROMPTS = ["import os\n", "def main(argv):\n    return", "", "naïve ☕"]
NUMBER = r"[\d,]+\.?\d*"
CLOSING = (
    rf"{NUMBER} tokens in {NUMBER} s: {NUMBER} tokens/s, {NUMBER} slots/s, {NUMBER} latent steps per token, "
    rf"{NUMBER} % of rows in use\n"
)


def timeless(results: Iterable[dict]) -> list[dict]:
    """The same without what a clock said."""
    return [{name: value for name, value in each.items() if not name.startswith("seconds")} for each in results]


@pytest.fixture(scope="module")
def run_dir(corpus) -> Path:
    """A trained run."""
    return finished_runs(corpus).whole


@pytest.fixture
def tool(ponder):
    """Runs the command in this process: its exit code, what it printed, and its errors."""
    return partial(ponder, "generate")


@pytest.fixture
def records(tool, run_dir):
    """The objects that the tool prints with --json, for several prompts."""

    def records(*arguments, checkpoint=run_dir) -> list[dict]:
        code, out, error = tool("--checkpoint", checkpoint, "--prompt", *PROMPTS, "--json", *arguments)
        assert code == 0
        assert re.fullmatch(CLOSING, error)
        return [json.loads(line) for line in out.splitlines()]

    return records


def test_json_of_several_prompts(records, run_dir):
    loaded = load_model(run_dir)
    results = records("--max-new-tokens", "9")
    assert len(results) == len(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result["prompt_tokens"] == (loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eod_id])
        before = loaded.tokenizer.decode(result["prompt_tokens"])
        assert before + result["text"] == loaded.tokenizer.decode(result["prompt_tokens"] + result["tokens"])
        assert result["finish_reason"] == "length"
        assert len(result["log_probabilities"]) == len(result["tokens"])
        assert 0 <= result["seconds_waited"] <= result["seconds_to_first"] <= result["seconds"]
        assert 0 < len(result["tokens"]) <= 9
        # every token but the last, which was never fed to the model
        assert len(result["executed_steps"]) == len(result["prompt_tokens"]) + len(result["tokens"]) - 1
        assert result["cached_slots"] == sum(result["executed_steps"]) + len(result["executed_steps"])


def test_a_checkpoint_folder_and_prompts_on_their_own_give_the_same(records, tool, run_dir):
    together = timeless(records("--max-new-tokens", "5"))
    assert timeless(records("--max-new-tokens", "5", checkpoint=run_dir / "checkpoints" / LATEST)) == together
    for prompt, want in zip(PROMPTS, together, strict=True):
        _, out, _ = tool("--checkpoint", run_dir, "--prompt", prompt, "--max-new-tokens", "5", "--json")
        alone = timeless([json.loads(out)])[0]
        assert alone.pop("log_probabilities") == pytest.approx(want.pop("log_probabilities"), abs=1e-5)
        assert alone | {"index": want["index"]} == want


def test_text(tool, run_dir):
    code, out, error = tool("--checkpoint", run_dir, "--prompt", "import os\n", "class A", "--max-new-tokens", "6")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "import os"
    assert any(line.startswith("class A") for line in lines)
    steps = [line for line in lines if line.startswith("latent steps: ")]
    assert len(steps) == 2
    assert "'\\\\n':" in steps[0] or "os" in steps[0]
    assert lines[-1].startswith("12 tokens in ")
    assert re.fullmatch(CLOSING, f"{lines[-1]}\n")


def test_threshold_from_every_step_to_none(records):
    def steps(*arguments):
        return [step for result in records("--max-new-tokens", "4", *arguments) for step in result["executed_steps"]]

    assert set(steps("--threshold", "0")) == {2}
    assert set(steps("--threshold", "1")) == {0}
    assert sum(steps("--router-bias", "-9")) < sum(steps("--router-bias", "9"))


def test_sampling_follows_the_seed(records):
    def tokens(*arguments):
        return [result["tokens"] for result in records("--max-new-tokens", "12", "--temperature", "1.5", *arguments)]

    assert tokens("--seed", "3") == tokens("--seed", "3")
    assert tokens("--seed", "3") != tokens("--seed", "4")
    greedy = [result["tokens"] for result in records("--max-new-tokens", "12")]
    assert tokens("--top-k", "1") == greedy
    assert tokens("--top-p", "1e-6") == greedy
    assert tokens("--min-p", "1") == greedy
    assert tokens("--repetition-penalty", "100", "--top-k", "1") != greedy


def test_generation_stops_at_the_end_of_a_document(tool, corpus, tmp_path):
    """A model whose final hidden state is always 1, and whose head then prefers the end token."""
    overrides = {"model__family": "gpt_neox", "model__vocab_size": 512}
    weights = {name: parameter.detach() for name, parameter in small_model(**overrides).named_parameters()}
    weights["transformer.norm.weight"] = torch.zeros(32)
    weights["transformer.norm.bias"] = torch.ones(32)
    weights["head.weight"] = torch.zeros(512, 32)
    weights["head.weight"][2] = 1
    write_weights_checkpoint(tmp_path / "model", weights, small_config(**overrides), corpus.tokenizer)
    _, out, _ = tool("--checkpoint", tmp_path / "model", "--prompt", "import", "--max-new-tokens", "20", "--json")
    result = json.loads(out)
    assert result["tokens"] == [2]
    assert len(result["executed_steps"]) == len(result["prompt_tokens"])
    assert (result["text"], result["finish_reason"]) == ("", "stop")
    command = ["--checkpoint", tmp_path / "model", "--prompt", "import", "--max-new-tokens", "20", "--json"]
    assert json.loads(tool(*command, "--ignore-eod")[1])["tokens"] == 20 * [2]


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (["--max-new-tokens", "999"], "999 new ones are asked for, but the model is meant for 256", "ask for fewer"),
        (["--threshold", "1.5"], "threshold is 1.5", "its range is 0 to 1"),
        (["--confidence-exit", "margin"], "margin:nan is no confidence exit", "choose entropy:X"),
        (["--confidence-exit", "margin:1"], "for a model of mode fixed, not for one of mode adaptive", "leave it out"),
        (["--top-p", "0"], "top_p is 0", "its range is 1e-6 to 1"),
        (["--temperature", "-1"], "temperature is -1", "its range is 0, or 1e-6 to 100"),
        (["--temperature", "nan"], "temperature is nan", "its range is 0, or"),
        (["--repetition-penalty", "1e-40"], "repetition_penalty is 1e-40", "its range is 0.01 to 100"),
        (["--stop", ""], "a stop string is empty", "leave it out"),
        (["--stop-tokens", "-3"], "stop_tokens is -3", "its range is 0 to"),
        (["--samples", "0"], "samples is 0", "its range is 1 to"),
        (["--max-sequences", "0"], "max_sequences is 0", "its range is 1 to"),
        (["--max-slots", "9"], "the cache is limited to 9", "raise max_slots"),
        (["--chunk", "0"], "chunk is 0", "its range is 1 to"),
        (["--refinements", "-1"], "refinements is -1", "its range is 0 to"),
        (["--prefill", "sequential", "--refinements", "1"], "are for --prefill jacobi", "leave them out"),
        (["--router-bias", "nan"], "router_bias is nan", "its range is -1,000 to 1,000"),
        (["--tensor", "2"], "1 rank cannot be divided into copies", "--nproc_per_node 2, or say --tensor 1"),
        (["--context", "2"], "a run with context ranks generates without any", "--tensor and --pipeline"),
        (["--pipeline", "3"], "leaves ranks without a layer", "--pipeline 2"),
        (["--stream", "--json"], "--stream prints texts", "leave out --json"),
        (["--interactive"], "--interactive asks for prompts", "leave out --prompt"),
        (["--prompts-file", "x"], "exclude each other", "write all prompts into the file"),
    ],
)
def test_mistakes_are_one_line(tool, run_dir, arguments, problem, remedy):
    code, out, error = tool("--checkpoint", run_dir, "--prompt", "a", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert problem in error
    assert remedy in error


def test_a_checkpoint_that_is_missing_damaged_or_has_no_tokenizer(tool, run_dir, tmp_path):
    def message(folder):
        code, out, error = tool("--checkpoint", folder, "--prompt", "a")
        assert (code, out, error.count("\n")) == (2, "", 1)
        return error

    assert "holds no complete checkpoint; give a run folder" in message(tmp_path / "missing")
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy")) / "checkpoints" / LATEST
    (copy / "config.yaml").unlink()
    assert f"{copy / 'config.yaml'} is missing; use another checkpoint" in message(copy)

    weights = {name: parameter.detach() for name, parameter in small_model().named_parameters()}
    write_weights_checkpoint(tmp_path / "bare", weights, small_config(), None)
    assert "has no tokenizer; train with tokenizer.path set" in message(tmp_path / "bare")
    (tmp_path / "ids.jsonl").write_text("[5, 6]\n")
    command = ["--checkpoint", tmp_path / "bare", "--max-new-tokens", "3"]
    result = json.loads(tool(*command, "--prompts-file", tmp_path / "ids.jsonl")[1])
    assert (len(result["tokens"]), result["text"]) == (3, "")
    assert "bare has no tokenizer; train with tokenizer.path" in tool(*command, "--interactive")[2]
    assert "No such file or directory" in tool(*command, "--prompts-file", tmp_path / "none.jsonl")[2]


def test_files_of_prompts(tool, run_dir, tmp_path):
    """Results have the order of the prompts, whichever ends first, and are those of each prompt alone."""
    lines = [
        {"prompt": "def main(argv):\n", "max_new_tokens": 20, "id": "long"},
        {"prompt": "import", "temperature": 1.5, "seed": 4, "samples": 2, "top_log_probabilities": 2},
        [5, 6, 7],
        {"prompt": "class", "stop": "e", "repetition_penalty": 2.0},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ["--checkpoint", run_dir, "--max-new-tokens", "4"]
    code, out, error = tool(*options, "--prompts-file", file, "--output", tmp_path / "new" / "out.jsonl")
    assert (code, error) == (0, "")
    assert re.fullmatch(CLOSING, out)
    results = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]
    assert [(result["index"], result["sample"], result.get("id")) for result in results] == [
        (0, 0, "long"), (1, 0, None), (1, 1, None), (2, 0, None), (3, 0, None),
    ]  # fmt: skip
    assert [len(result["tokens"]) for result in results][:4] == [20, 4, 4, 4]
    assert results[3]["prompt_tokens"] == [5, 6, 7]
    assert "e" not in results[4]["text"]
    assert [len(top) for top in results[1]["top_log_probabilities"]] == [2, 2, 2, 2]

    code, printed, error = tool(*options, "--prompts-file", file)
    assert code == 0
    assert re.fullmatch(CLOSING, error)
    assert timeless(json.loads(line) for line in printed.splitlines()) == timeless(results)
    _, printed, _ = tool(*options, "--prompt", "import", "--temperature", "1.5", "--seed", "5", "--json")
    assert json.loads(printed)["tokens"] == results[2]["tokens"]


def test_a_prompt_whose_logits_are_not_finite_fails_alone(tool, corpus, tmp_path):
    """Its line says so, those of the others are what they would be, and the command ends with 2."""
    overrides = {"model__family": "gpt_neox", "model__vocab_size": 512}
    weights = {name: parameter.detach() for name, parameter in small_model(**overrides).named_parameters()}
    weights["embedding.weight"][9] = 3e38  # finite, and its norm is not
    write_weights_checkpoint(tmp_path / "model", weights, small_config(**overrides), corpus.tokenizer)
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('[5, 6]\n{"prompt": [5, 9], "id": "bad"}\n[7]\n')
    command = ["--checkpoint", tmp_path / "model", "--max-new-tokens", "4"]
    code, out, error = tool(*command, "--prompts-file", file, "--output", output)
    assert (code, error) == (2, f"error: 1 of 3 sequences failed; their error in {output} says why\n")
    assert re.fullmatch(CLOSING, out)
    first, bad, last = (json.loads(line) for line in output.read_text().splitlines())
    assert (bad["id"], bad["finish_reason"], bad["tokens"]) == ("bad", "failed", [])
    assert "the model's logits are not finite" in bad["error"]
    assert [each["finish_reason"] for each in (first, last)] == ["length", "length"]
    assert "error" not in first
    code, out, error = tool(*command, "--prompt", "import")
    assert (code, error) == (0, "")


def test_a_file_that_was_interrupted_goes_on(tool, run_dir, tmp_path, monkeypatch):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(f'{{"prompt": "def f{n}", "max_new_tokens": {n + 1}}}\n' for n in range(12)))
    command = ["--checkpoint", run_dir, "--prompts-file", file, "--output", output, "--max-sequences", "2"]
    add = ResultWriter.add

    def interrupting(writer, index, content):
        add(writer, index, content)
        if index == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ResultWriter, "add", interrupting)
        code, _, error = tool(*command)
    assert code == 130
    done = int(re.fullmatch(r"interrupted after (\d+) of 12 sequences; .* goes on\n", error)[1])
    assert 5 <= done < 12
    assert not output.exists()
    code, _, error = tool(*command, "--threshold", "0.9")
    assert (code, error.count("\n")) == (2, 1)
    assert "unfinished results with another threshold; repeat the command that made them" in error
    code, out, error = tool(*command)
    assert (code, error) == (0, "")
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(result["tokens"]) for result in results] == list(range(1, 13))
    assert f"{sum(range(done + 1, 13))} tokens in" in out
    assert "out.jsonl exists already; choose another --output" in tool(*command)[2]


def test_nothing_begins_when_a_line_of_many_is_wrong(tool, run_dir, tmp_path):
    lines = ['{"prompt": "good"}'] * 1000
    lines[700] = '{"prompt": "bad", "top_p": 7}'
    lines[800] = "{"
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    command = ["--checkpoint", run_dir, "--prompts-file", tmp_path / "prompts.jsonl", "--output", tmp_path / "out"]
    code, out, error = tool(*command)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "prompts.jsonl line 701: top_p is 7; its range is" in error
    assert "(1 more prompt is refused too)" in error
    lines[700], lines[800] = '{"prompt": [1], "max_new_tokens": 256}', '"good"'
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    code, out, error = tool(*command)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "prompts.jsonl line 701: the prompt has 1 token and 256 new ones are asked for" in error
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_standard_input_and_streams(tool, run_dir, monkeypatch):
    text = "def f(x):\n\treturn"
    command = ["--checkpoint", run_dir, "--max-new-tokens", "6"]
    _, want, _ = tool(*command, "--prompt", text)
    assert text in want
    for arguments in ([], ["--prompt", "-"], ["--stream"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{text}\n".encode())))
        code, out, error = tool(*command, *arguments)
        assert (code, error) == (0, "")
        assert out.splitlines()[:-1] == want.splitlines()[:-1]
    prompts = ["import os", text, "class"]
    _, whole, _ = tool(*command, "--prompt", *prompts, "--samples", "2", "--temperature", "1")
    _, streamed, _ = tool(*command, "--prompt", *prompts, "--samples", "2", "--temperature", "1", "--stream")
    assert streamed.splitlines()[:-1] == whole.splitlines()[:-1]


def test_conversation(tool, run_dir, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"import os\n\n{'long ' * 300}\nclass".encode())))
    code, out, error = tool("--checkpoint", run_dir, "--interactive", "--max-new-tokens", "5")
    assert (code, error) == (0, "")
    lines = [line for line in out.splitlines() if line]
    assert len(re.findall(CLOSING, out)) == 2
    assert lines[0].startswith("import os")
    assert any(line.startswith("class") for line in lines)
    assert sum("the model is meant for 256; shorten the prompt" in line for line in lines) == 1
    json_lines = tool("--checkpoint", run_dir, "--prompt", "class", "--max-new-tokens", "5", "--json")[1]
    assert json.loads(json_lines)["text"] in out


def test_other_ways_of_computing_give_the_same(records):
    def tokens(*arguments):
        return [(each["tokens"], each["executed_steps"]) for each in records("--max-new-tokens", "8", *arguments)]

    want = tokens()
    assert tokens("--prefill", "sequential") == want
    assert tokens("--chunk", "3", "--tolerance", "1e-6") == want
    assert tokens("--refinements", "50") == want
    assert tokens("--max-sequences", "1") == want
    assert tokens("--max-slots", "150") == want
    rounded = records("--max-new-tokens", "8", "--precision", "bf16")
    assert all(len(result["tokens"]) == 8 for result in rounded)


def test_ends(records):
    free = records("--max-new-tokens", "10")
    token = free[0]["tokens"][3]
    for before, after in zip(free, records("--max-new-tokens", "10", "--stop-tokens", token, 511), strict=True):
        place = before["tokens"].index(token) + 1 if token in before["tokens"] else 10
        assert after["tokens"] == before["tokens"][:place]
        assert after["finish_reason"] == ("stop" if token in before["tokens"][:place] else "length")
    stop = free[1]["text"][3:5]
    for before, after in zip(free, records("--max-new-tokens", "10", "--stop", stop, "☃"), strict=True):
        assert after["text"] == before["text"].partition(stop)[0]


def on_ranks(count: int, *arguments: object, typed: str = "") -> list[Ended]:
    """Run the command on so many ranks, each with something to read; how each has ended."""
    with tempfile.TemporaryFile("w+") as given:
        given.write(typed)
        given.flush()
        given.seek(0)
        streams = {"stdin": given, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes = [Forked("generate", *arguments, env=env, **streams) for env in environments(count)]
        printed = [process.communicate(300) for process in processes]
    return [Ended(process.wait(), *texts) for process, texts in zip(processes, printed, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (2, ["--tensor", 2]),
        (2, ["--pipeline", 2]),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(4, ["--tensor", 2, "--pipeline", 2], marks=pytest.mark.slow),
        pytest.param(4, ["--pipeline", 2], marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline", "copies", "tensor-pipeline", "pipeline-copies"],
)
def test_ranks_give_what_one_process_gives(tool, run_dir, tmp_path, ranks, sizes):
    lines = [
        {"prompt": prompt, "temperature": 0.7 * (n % 2), "id": n, "samples": 2} for n, prompt in enumerate(PROMPTS)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = ["--checkpoint", run_dir, "--prompts-file", tmp_path / "prompts.jsonl", "--max-new-tokens", 12]
    assert tool(*command, "--output", tmp_path / "one.jsonl")[0] == 0
    done, *others = on_ranks(ranks, *command, *sizes, "--output", tmp_path / "ranks.jsonl")
    assert {ended.code for ended in (done, *others)} == {0}, done.err
    assert re.fullmatch(CLOSING, done.out)
    want, got = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("one.jsonl", "ranks.jsonl")
    )
    for one, other in zip(timeless(want), timeless(got), strict=True):
        assert other.pop("log_probabilities") == pytest.approx(one.pop("log_probabilities"), abs=1e-4)
        assert other == one


@pytest.mark.slow
def test_texts_of_ranks_are_printed_once(tool, run_dir):
    command = ["--checkpoint", run_dir, "--prompt", "import", "def f", "class", "--max-new-tokens", 5]
    _, want, _ = tool(*command)
    for ranks, options in [(2, ["--pipeline", 2, "--stream"]), (2, [])]:
        done, *others = on_ranks(ranks, *command, *options)
        assert (done.code, done.out.splitlines()[:-1]) == (0, want.splitlines()[:-1])
        assert {(other.code, other.out) for other in others} == {(0, "")}


@pytest.mark.slow
def test_a_conversation_with_ranks(tool, run_dir, monkeypatch):
    command, lines = ["--checkpoint", run_dir, "--interactive", "--max-new-tokens", 5], "import os\nclass\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    want = [line for line in tool(*command)[1].splitlines() if " tokens in " not in line]
    done, other = on_ranks(2, *command, "--tensor", 2, typed=lines)
    assert (done.code, other.code) == (0, 0), done.err
    assert [line for line in done.out.splitlines() if " tokens in " not in line] == want


@pytest.mark.slow
def test_mistakes_end_every_rank_with_one_line(run_dir, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"good"\n{"prompt": "a", "seed": -1}\n')
    for arguments, message in [
        (["--prompt", "a", "--tensor", 3], "--tensor 3 does not divide the model's num_heads 2; the largest below it"),
        (["--prompts-file", tmp_path / "prompts.jsonl"], "prompts.jsonl line 2: seed is -1; its range is 0"),
    ]:
        (code, out, error), *others = on_ranks(2, "--checkpoint", run_dir, *arguments)
        assert code == 2
        assert others == [(2, "", "")]
        assert (out, error.count("\n")) == ("", 1)
        assert error.startswith("error: ")
        assert message in error
