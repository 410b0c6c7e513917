import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.store import write_weights_checkpoint
from tests.models import small_config, small_model
from tests.runs import LATEST, finished_runs

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"
PROMPTS = ["import os\n", "def main(argv):\n    return", "", "naïve ☕"]


@pytest.fixture(scope="module")
def run_dir(corpus) -> Path:
    """A trained run."""
    return finished_runs(corpus).whole


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool in this process: its exit code, what it printed, and its errors."""
    monkeypatch.setenv("COLUMNS", "400")

    def tool(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, error = capsys.readouterr()
        return code, out, error

    yield tool
    torch.set_flush_denormal(False)  # which the tool has set


@pytest.fixture
def records(tool, run_dir):
    """The objects that the tool prints with --json, for several prompts."""

    def records(*arguments, checkpoint=run_dir) -> list[dict]:
        code, out, error = tool("--checkpoint", checkpoint, "--prompt", *PROMPTS, "--json", *arguments)
        assert (code, error) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return records


def test_json_of_several_prompts(records, run_dir):
    loaded = load_model(run_dir)
    results = records("--max-new-tokens", "9")
    assert len(results) == len(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result["prompt_tokens"] == (loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eod_id])
        assert result["text"] == loaded.tokenizer.decode(result["tokens"])
        assert 0 < len(result["tokens"]) <= 9
        # every token but the last, which was never fed to the model
        assert len(result["executed_steps"]) == len(result["prompt_tokens"]) + len(result["tokens"]) - 1
        assert result["cached_slots"] == sum(result["executed_steps"]) + len(result["executed_steps"])


def test_a_checkpoint_folder_and_prompts_on_their_own_give_the_same(records, tool, run_dir):
    together = records("--max-new-tokens", "5")
    assert records("--max-new-tokens", "5", checkpoint=run_dir / "checkpoints" / LATEST) == together
    for prompt, want in zip(PROMPTS, together, strict=True):
        _, out, _ = tool("--checkpoint", run_dir, "--prompt", prompt, "--max-new-tokens", "5", "--json")
        assert json.loads(out) == want


def test_text(tool, run_dir):
    code, out, error = tool("--checkpoint", run_dir, "--prompt", "import os\n", "class A", "--max-new-tokens", "6")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "import os"
    assert any(line.startswith("class A") for line in lines)
    steps = [line for line in lines if line.startswith("additional steps: ")]
    assert len(steps) == 2
    assert "'\\\\n':" in steps[0] or "os" in steps[0]
    assert "12 tokens in " in lines[-1]
    assert all(words in lines[-1] for words in ("tokens/s", "slots/s", "additional steps per token"))


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
    assert tokens("--top-p", "1e-9") == greedy


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


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (["--max-new-tokens", "999"], "999 new ones are asked for, but the model is meant for 256", "ask for fewer"),
        (["--threshold", "1.5"], "threshold 1.5 is not a weight", "choose it between 0"),
        (["--top-p", "0"], "top_p must lie above 0", "top_p"),
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
