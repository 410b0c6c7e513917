"""Whatever a description, a folder or a prompt is called: scripts hand it on as it is, and execute nothing of it.

Each script is run by bash, in a folder with such a name, with an srun, mpirun and so on that note their words.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster, check_cluster, read_cluster
from megatron_ponder.cluster.jobs import JOBS, SCRIPTS, render
from tests import REPOSITORY

# What a shell would execute, expand, or take apart; each command would leave a file behind.
HOSTILE = "a  $(touch hacked) `touch hacked`; touch hacked & 'b' \"c\" $HOME * ? [d] {e,f} ~ #g !h <(touch hacked) 100%"
STUBS = ("srun", "mpirun", "module", "scontrol", "squeue", "apptainer", "nvidia-smi")
GENERATE = "megatron_ponder/cluster/scripts/generate.sh"
# Its name, its words and its input, each ended by a zero.
STUB = """#!/bin/bash
[ "$(basename "$0")" = squeue ] && exit
[ "$(basename "$0")" = scontrol ] && { echo node1; exit; }
[ "$(basename "$0")" = nvidia-smi ] && { [ -n "$GPUS" ] && echo "GPU 0: $GPUS"; exit; }
printf '%s\\0' "$(basename "$0")" "$@" >> "$NOTES"
[ "$(basename "$0")" = module ] || cat >> "$NOTES"
"""


@dataclass(frozen=True)
class Checkout:
    """A folder with the scripts, and what runs of them have noted beside it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, **environment: str) -> list[str]:
        """Run a command here that has to succeed; what was started by it, word by word."""
        notes = Path(self.environment["NOTES"])
        notes.unlink(missing_ok=True)
        done = subprocess.run(
            [*map(str, command)],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not list(self.folder.parent.rglob("hacked")), command
        return notes.read_text().split("\0") if notes.exists() else []


@pytest.fixture(params=["repository", HOSTILE.replace("/", "")], ids=["honest", "hostile"])
def checkout(request, tmp_path) -> Checkout:
    folder, programs = tmp_path / request.param, tmp_path / "programs"
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    shutil.copytree(SCRIPTS, folder / SCRIPTS.relative_to(REPOSITORY))
    programs.mkdir()
    for name in STUBS:
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "0"}
    slurm |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node1", "SLURM_GPUS_PER_NODE": "h100:4"}
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "NOTES": str(tmp_path / "notes")}
    return Checkout(folder, own | slurm)


def cluster(folder: Path, **changes) -> Cluster:
    """A description in which every word is hostile."""
    venv = folder / "venv" / HOSTILE
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "activate").touch()
    words = {"account": HOSTILE, "partition": HOSTILE, "log_folder": HOSTILE, "modules": [HOSTILE]}
    words |= {"environment": {"VALUE": HOSTILE}, "sbatch": [f"--comment={HOSTILE}"], "venv": str(venv)} | changes
    options = [
        f"--{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in words.items()
    ]
    described = read_cluster([option for option in options if not option.endswith("=null")])
    check_cluster(described)
    return described


@pytest.mark.parametrize("name", JOBS)
def test_jobs(checkout, name):
    environment = {"VALUE": HOSTILE, "PYTHON": shlex.quote(HOSTILE), "SRUN_OPTIONS": f"-A {shlex.quote(HOSTILE)}"}
    described = cluster(checkout.folder, environment=environment)
    script = render(JOBS[name], described, ["--data.path", HOSTILE, "-- "], checkout.folder)
    (checkout.folder / "prompts").write_text("import\n")
    with (checkout.folder.parent / "script").open("w") as file:
        file.write(script.replace("\nset --", '\nprintf "%s\\0" "$VALUE" "$PWD" >> "$NOTES"\nset --', 1))
    noted = checkout.run("bash", file.name, PROMPTS="prompts", OUTPUT=f"out/{HOSTILE}", RUNS=HOSTILE)
    assert noted[:2] == ["module", "load"]
    assert noted[2] == noted[3] == HOSTILE
    assert Path(noted[4]).samefile(checkout.folder)
    words = noted[noted.index("srun") :]
    assert words[1:3] == ["-A", HOSTILE]
    given = words.index("--data.path")
    assert HOSTILE in words[3:given]  # Python
    assert words[given : given + 3] == ["--data.path", HOSTILE, "-- "]
    if name == "seeds":
        assert f"--training.run_dir={HOSTILE}/seed-0" in words
    if name == "train-torchrun":
        assert "--nproc-per-node=8" in words
    if name == "generate":
        assert [path.name for path in (checkout.folder / "out" / HOSTILE).iterdir()] == ["part-00001.jsonl"]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers(checkout, runtime):
    if checkout.folder.name == HOSTILE:
        with pytest.raises(UserError, match="options of jobs cannot have ','; start in another"):  # mounts divide there
            render(JOBS["evaluate"], Cluster(container="a.sif"), [], checkout.folder)
        return
    described = cluster(
        checkout.folder, venv=None, container=HOSTILE, container_runtime=runtime, container_mounts=[HOSTILE]
    )
    script = render(JOBS["evaluate"], described, [HOSTILE], checkout.folder)
    noted = checkout.run("bash", "-c", script)
    words = noted[noted.index("srun") + 1 : -1]
    folder = str(checkout.folder)
    if runtime == "pyxis":
        own = [f"--container-image={HOSTILE}", f"--container-mounts={folder}:{folder},{HOSTILE}"]
        assert words == [*own, f"--container-workdir={folder}", "python", "-m", "megatron_ponder", "evaluate", HOSTILE]
    else:
        own = ["--nv", "--bind", folder, "--bind", HOSTILE, HOSTILE]
        assert words == ["apptainer", "exec", *own, "python", "-m", "megatron_ponder", "evaluate", HOSTILE]


def test_options_of_sbatch_are_one_word_each(checkout):
    script = render(JOBS["train"], cluster(checkout.folder), [], checkout.folder)
    header = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in header]
    assert all(len(line) == 1 for line in words)
    words = [line[0] for line in words]
    assert {f"--account={HOSTILE}", f"--partition={HOSTILE}", f"--comment={HOSTILE}"} <= set(words)
    folder = str(checkout.folder / HOSTILE).replace("%", "%%")  # where SLURM would put numbers of jobs
    assert f"--output={folder}/%x-%j.log" in words


def test_a_folder_that_sbatch_cannot_name(tmp_path):
    with pytest.raises(UserError, match=r"options of jobs cannot have '.n'; start in another"):
        render(JOBS["train"], Cluster(), [], tmp_path / "a\n#SBATCH --uid=0")


def test_prompts_are_no_options(checkout):
    prompts = ["--checkpoint", "-", "", HOSTILE, 'say "a\\b"', "\ttab", "é", "--interactive"]
    (checkout.folder / "-prompts").write_text("\n".join(prompts) + "\r\n")
    noted = []
    for task in range(3):
        numbers = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MAX": "2"}
        words = checkout.run("bash", GENERATE, "--x", PROMPTS="-prompts", OUTPUT="-o", **numbers)
        assert words[:8] in ([], ["srun", "python", "-m", "megatron_ponder", "generate", "--x", "--prompts-file", "-"])
        noted += [[json.loads(line) for line in part.splitlines()] for part in words[8:]]
    assert [prompt for part in noted for prompt in part] == prompts
    assert 1 < len(noted) == len(list((checkout.folder / "-o").iterdir()))  # a long line fills a part alone


@pytest.mark.parametrize("missing", ["PROMPTS", "OUTPUT"])
def test_a_job_without_prompts_does_not_end_well(checkout, missing):
    environment = checkout.environment | {"PROMPTS": "prompts", "OUTPUT": "out"}
    command = ["bash", GENERATE]
    for given in ({name: value for name, value in environment.items() if name != missing}, environment):
        done = subprocess.run(command, cwd=checkout.folder, env=given, capture_output=True, text=True, check=False)
        assert done.returncode not in (0, 75)
        assert (missing if missing not in given else "prompts") in done.stderr


@pytest.mark.parametrize("script", ["train", "preprocess"])
def test_mpi(checkout, script):
    words = checkout.run(
        f"examples/mpi/{script}.sh",
        HOSTILE,
        RANKS="2",
        HOSTS=HOSTILE,
        MPIRUN_OPTIONS=f"-x {shlex.quote(HOSTILE)}",
        PYTHON=shlex.quote(HOSTILE),
    )
    assert words[:8] == ["mpirun", "-x", HOSTILE, "-np", "2", "-host", HOSTILE, HOSTILE]
    assert words[8:12] == ["-m", "megatron_ponder", script, HOSTILE]


def test_one_machine(checkout):
    python = checkout.folder / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    quoted = shlex.quote(str(python))
    words = checkout.run("examples/single_node/train.sh", HOSTILE, PYTHON=quoted, GPUS="one\nGPU 1: two")
    agent = ["-m", "megatron_ponder", "torchrun", "--standalone", "--nproc-per-node", "2"]
    assert words[:11] == ["python", *agent, "-m", "megatron_ponder", "train", HOSTILE]
    words = checkout.run("examples/single_node/train.sh", HOSTILE, PYTHON=quoted, RANKS="3")
    assert words[6] == "3"
    command, environment = ["examples/single_node/train.sh"], checkout.environment | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=checkout.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: nvidia-smi finds no GPU on this machine; set RANKS to the number of processes, such as RANKS=2\n"
    )


def test_words_that_cannot_be_taken_apart_end_the_job(checkout):
    environment = checkout.environment | {"PYTHON": "python 'a", "RANKS": "1"}
    command = ["examples/single_node/train.sh"]
    done = subprocess.run(command, cwd=checkout.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unmatched single quote" in done.stderr
