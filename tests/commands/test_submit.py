"""The command that shows and submits jobs."""

import re
from functools import partial

import pytest

from megatron_ponder.cluster.description import OF_ESTIMATES, Cluster
from megatron_ponder.cluster.jobs import JOBS
from tests import REPOSITORY
from tests.pages import calls


@pytest.fixture
def command(ponder):
    """Runs the command in this process; returns exit code, output and errors."""
    return partial(ponder, "submit")


@pytest.fixture
def sbatch(monkeypatch, tmp_path):
    """An sbatch that keeps what it is given, and gives the number 42."""
    file = tmp_path / "sbatch"
    file.write_text(f"#!/bin/sh\ncat > {tmp_path}/submitted\necho 42\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "submitted"


TRAINING = ["train", "--config", str(REPOSITORY / "examples" / "configs" / "llama_410m.yaml"), "--parallel.tensor=4"]


def test_a_script_is_shown_and_not_submitted(command, sbatch):
    code, output, errors = command("--nodes", "4", *TRAINING)
    assert (code, errors) == (0, "")
    assert output.startswith("#!/bin/bash\n#SBATCH --job-name=train\n#SBATCH --nodes=4\n")
    assert "--parallel.tensor=4" in output
    assert not sbatch.exists()


def test_what_is_submitted_is_what_was_shown(command, sbatch, tmp_path):
    logs = tmp_path / "logs"
    code, output, _ = command("--submit", "--log_folder", str(logs), "--after=41", *TRAINING)
    assert code == 0
    script, last = output.rsplit("\n", 2)[:2]
    assert last == "submitted job 42"
    assert sbatch.read_text().strip() == script.strip()
    assert "#SBATCH --dependency=afterok:41" in script
    assert logs.is_dir()  # SLURM makes no folders for what jobs print


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: name one after the options: train, "),
        (["--nodes", "2"], "name one after"),
        (["--nodes"], "name one after"),
        (["tarin"], '"tarin" is no job'),
        (["--after", "yesterday", *TRAINING], "takes the number of a job"),
        (["--after"], "name one after"),
        (["--nods=2", *TRAINING], "a cluster has no nods"),
        (["--tflops", "400", *TRAINING], "--tflops is read by ponder estimate alone and would change no job"),
        (["--gpu=H100", *TRAINING], "--gpu is read by ponder estimate alone"),
        ([*TRAINING, "--training.stepps=4"], "did you mean training.steps?"),
        (["--gpus_per_node", "2", *TRAINING, "--parallel.tensor=8"], "stay inside a node|cannot be divided"),
    ],
)
def test_mistakes_are_answered_in_one_line(command, sbatch, arguments, message):
    code, output, errors = command("--submit", *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert any(part in errors for part in message.split("|"))
    assert not sbatch.exists()


def test_a_machine_without_slurm(command, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = command("--submit", "--log_folder", str(tmp_path), *TRAINING)
    assert (code, errors) == (2, "error: there is no sbatch here; submit on a login node of the cluster\n")


def test_what_sbatch_says_is_passed_on(command, sbatch, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2\nexit 1\n")
    code, _, errors = command("--submit", "--log_folder", str(tmp_path), *TRAINING)
    assert (code, errors) == (2, "error: sbatch refuses: sbatch: error: invalid partition\n")


@pytest.mark.parametrize("call", calls("ponder submit"), ids=str)
def test_what_the_pages_submit_is_accepted_with_the_example_of_a_cluster(command, sbatch, call):
    known = {"$data": "41", "$job": "42", "--submit": None}
    words = [known.get(word, word) for word in call.filled_in()]
    code, output, errors = command(*[word for word in words if word is not None])
    assert (code, errors) == (0, "")
    assert output.startswith("#!/bin/bash\n#SBATCH --job-name=")
    assert not sbatch.exists()


def test_paths_mean_the_same_to_command_and_job(command, sbatch, monkeypatch, tmp_path):
    folder = tmp_path / "anywhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    code, output, errors = command("--submit", *TRAINING)
    assert (code, errors) == (0, "")
    assert f"\ncd {folder}\n" in output
    assert f"#SBATCH --output={folder}/runs/slurm/%x-%j.log\n" in output
    assert (folder / "runs" / "slurm").is_dir()


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--nodes", "2", "--help"]])
def test_help_names_every_job_and_option(command, words):
    code, output, errors = command(*words)
    assert (code, errors) == (0, "")
    assert all(name in output for name in JOBS)
    options = {*Cluster.__dataclass_fields__, "cluster", "after", "submit"}
    offered = {name for name in options if re.search(rf"^ +--{name}\b", output, re.MULTILINE)}
    assert options - offered == set(OF_ESTIMATES)
    assert "default: 24:00:00" in " ".join(output.split())
