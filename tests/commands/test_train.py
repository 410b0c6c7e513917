"""The command as a user meets it when something is wrong: one line that says what to do, and nothing good is lost."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.config import read_config
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer_training import train_tokenizer
from megatron_ponder.parallel import process_group
from megatron_ponder.runs.metrics import read_metrics
from tests import REPOSITORY
from tests.finished_runs import LATEST, contents, finished_runs, refused, tiny_arguments
from tests.pages import calls
from tests.processes import SMALL, Forked, environments


def command(*arguments, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run the command as a user would, under torchrun with several ranks."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / "pretrain_ponder.py"), *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | SMALL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def answer(ponder):
    """Runs the command in this process, expects it to refuse, and returns its one line."""

    def answer(*arguments) -> str:
        code, out, error = ponder("train", *arguments)
        assert code == 2
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return answer


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """Another tokenizer of the same size, and another dataset made with it."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = train_tokenizer([corpus.text], folder / "tokenizer", vocab_size=512).path
    files = sorted(corpus.text.parent.glob("*.py"))[:30]
    return tokenizer, preprocess(files, folder / "other", tokenizer).prefix


@pytest.fixture
def run(corpus, tmp_path) -> Path:
    """A copy of a finished run, with checkpoints at 4 and 8, that a test may damage."""
    return Path(shutil.copytree(finished_runs(corpus).whole, tmp_path / "run"))


# The command line and the file


def test_an_unknown_key_of_a_file_through_the_real_command(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  hidden_sise: 64\n")
    done = command("--config", file)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: unknown configuration key model.hidden_sise in {file}; did you mean model.hidden_size?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (["--trainning.steps", "5"], "unknown configuration key trainning.steps", "did you mean training.steps?"),
        (["--training.steps", "many"], "training.steps", "many"),
        (["--config", "no/such.yaml"], "there is no configuration file no/such.yaml", "check the path"),
        (["--model.hidden_size=30", "--model.num_heads=4"], "not divisible by model.num_heads 4", "for example 32"),
        (["--ponder.latent_steps=0"], "needs ponder.latent_steps of at least 1", "set ponder.mode to vanilla"),
        (["--ponder.mode=fixed", "--ponder.latent_steps=0"], "ponder.mode fixed needs", "set ponder.mode to vanilla"),
        (["--parallel.tensor=5"], "parallel.tensor 5 does not divide", "the largest that works is parallel.tensor 4"),
        (["--parallel.pipeline=13"], "leaves ranks without a block", "set parallel.pipeline to 12"),
        (["--parallel.zero_stage=4"], "parallel.zero_stage is 4", "its range is 0 to 3"),
        (["--ponder_training.penalty_start=9"], "ponder_training.penalty_start 9", "ponder_training.penalty_end 0"),
        (["--model.max_position_embeddings=8"], "longer than model.max_position_embeddings 8", "raise the other"),
    ],
)
def test_a_configuration_that_cannot_work(answer, arguments, problem, remedy):
    message = answer(*arguments)
    assert problem in message
    assert remedy in message


@pytest.mark.parametrize("content", ["", "model: 3\n", "- a\n", "model: {hidden_size: [\n", "modle:\n  x: 1\n"])
def test_a_file_that_is_no_configuration(answer, tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert str(file) in answer("--config", file)


def test_what_a_run_asks_of_its_ranks_reaches_them(answer, run_arguments, monkeypatch):
    asked = {}

    @contextmanager
    def group(launch: Launch, **options):
        asked.update(options)
        raise UserError("no ranks here")
        yield

    monkeypatch.setattr(process_group, "process_group", group)
    answer(*run_arguments, "--training.deterministic=true", "--parallel.start_timeout=7")
    assert asked == {"deterministic": True, "patience": 7}


def test_an_error_of_all_ranks_is_printed_once(run_arguments, other, tmp_path):
    arguments = [*run_arguments, f"--tokenizer.path={other[0]}"]
    ranks = [Forked("train", *arguments, env=env, stderr=subprocess.PIPE) for env in environments(2)]
    errors = [rank.communicate(200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert [said.count("was made with another tokenizer") for said in errors] == [1, 0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once_under_torchrun(run_arguments, other, tmp_path):
    done = command(*run_arguments, f"--tokenizer.path={other[0]}", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("was made with another tokenizer") == 1
    # torchrun's own report names every rank that failed by itself; it ends the others
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_the_configuration_is_printed_once(run_arguments):
    done = command(*run_arguments, "--ponder.max_stepps=3", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("unknown configuration key ponder.max_stepps") == 1


def ranks_in_the_environment(monkeypatch, rank: int) -> None:
    """As if torchrun had started six ranks, of which no other is alive."""
    for name, value in environments(6)[rank].items():
        monkeypatch.setenv(name, value)


def test_a_layout_that_cannot_work_is_refused_without_any_other_rank(monkeypatch, run_arguments, tmp_path):
    ranks_in_the_environment(monkeypatch, rank=0)
    impossible = ["--parallel.pipeline=2", "--parallel.tensor=2"]
    done = Forked("train", *run_arguments, *impossible, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.communicate(200) == (
        "",
        "error: 6 ranks cannot be divided into groups of parallel.tensor × parallel.pipeline = 4; start a multiple of "
        "4 ranks, or add --parallel.pipeline 1 --training.global_batch_size 6\n",
    )
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


def test_other_ranks_leave_the_report_to_the_first(ponder, monkeypatch, run_arguments):
    ranks_in_the_environment(monkeypatch, rank=3)
    monkeypatch.setattr("megatron_ponder.base.errors.SECONDS_FOR_THE_REPORT", 0.0)
    assert ponder("train", *run_arguments, "--parallel.pipeline=2", "--parallel.tensor=2") == (2, "", "")
    assert not torch.distributed.is_initialized()


# The run folder


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_made(run_arguments, tmp_path, where):
    file = tmp_path / "file"
    file.write_text("precious")
    message = refused([*run_arguments, f"--training.run_dir={tmp_path / where}"])
    assert str(file) in message
    assert "choose another folder" in message
    assert file.read_text() == "precious"


def test_a_run_folder_with_checkpoints_is_not_overwritten(run, corpus):
    before = contents(run)
    message = refused(tiny_arguments(corpus, run))
    assert f"already holds checkpoints, the last one {LATEST}" in message
    assert "add --checkpoint.resume auto" in message
    assert contents(run) == before


# Resuming


def resumed(corpus, run, *overrides) -> list[str]:
    """Goes on from the latest checkpoint by its name, in place of which no other is taken."""
    latest = run / "checkpoints" / LATEST
    return [*tiny_arguments(corpus, run, training__steps=12), f"--checkpoint.resume={latest}", *overrides]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", ["tensors-00000-of-00001.safetensors", "config.yaml", "tokenizer/tokenizer.model"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_changed(run, corpus, name, damage):
    path = run / "checkpoints" / LATEST / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-10] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    before = contents(run)
    message = refused(resumed(corpus, run))
    assert message.startswith(f"{path} ")
    assert f"delete {path.parents[len(Path(name).parents) - 1]} to go on from the one before" in message
    assert contents(run) == before

    shutil.rmtree(run / "checkpoints" / LATEST)  # what the message says, and then the older one is found
    automatic = ["--checkpoint.resume=auto", "--model.hidden_size=32"]
    assert "hidden_size is 32" in refused(resumed(corpus, run, *automatic))


def test_a_damaged_manifest(run, corpus):
    manifest = run / "checkpoints" / LATEST / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    before = contents(run)
    message = refused(resumed(corpus, run))
    assert f"{manifest} is damaged (it is no JSON); resume from another checkpoint in {run / 'checkpoints'}" in message
    assert contents(run) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.hidden_size=32", "model.hidden_size is 32, but"),
        ("--model.num_layers=1", "set --model.num_layers 2"),
        ("--ponder.mode=fixed", "set --ponder.mode adaptive"),
        ("--ponder.latent_steps=3", "set --ponder.latent_steps 2"),
        ("--training.steps=3", "has done 8 steps already; set training.steps to more"),
    ],
)
def test_a_checkpoint_of_another_model_or_a_longer_run(run, corpus, override, message):
    before = contents(run)
    assert message in refused(resumed(corpus, run, override))
    assert contents(run) == before


def test_other_data_and_another_tokenizer(run, corpus, other):
    tokenizer, dataset = other
    before = contents(run)
    changed = resumed(corpus, run, f"--data.path={dataset}", f"--tokenizer.path={tokenizer}")
    message = refused(changed)
    assert f"the data are not those that {run}" in message
    assert f"the dataset {dataset}, data.split, data.sequence_length or training.seed has changed" in message
    assert "add --checkpoint.allow_data_change true" in message
    message = refused([*changed, "--checkpoint.allow_data_change", "true"])
    assert f"the tokenizer {tokenizer} is not the one" in message
    assert "set tokenizer.path to the tokenizer of that run" in message
    assert contents(run) == before


def test_other_data_if_the_user_says_so(run, corpus):
    runs = finished_runs(corpus)
    for other in (f"--data.path={runs.other_dataset}", "--data.split=80,20,0", "--training.seed=99"):
        assert "allow_data_change true" in refused(resumed(corpus, run, other))
    assert [record["step"] for record in read_metrics(runs.moved)] == [5, 6, 7, 8]
    assert read_metrics(runs.moved)[-1]["samples"] == 32
    before, after = (read_manifest(resolve_checkpoint(path)) for path in (runs.whole, runs.moved))
    assert after.data_fingerprint != before.data_fingerprint


# The documentation

TRAINING = ("ponder train", "megatron_ponder train", "examples/single_node/train.sh", "examples/mpi/train.sh")


@pytest.mark.parametrize("call", [call for program in TRAINING for call in calls(program)], ids=str)
def test_what_the_pages_train_is_a_configuration(monkeypatch, call):
    monkeypatch.chdir(REPOSITORY)
    if call.answer.startswith("error: "):
        with pytest.raises(UserError, match=re.escape(call.answer.removeprefix("error: "))):
            read_config(call.filled_in())
    else:
        read_config(call.filled_in())
