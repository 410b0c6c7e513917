"""The script that is submitted for a job: right options, right environment, and the job's script as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.jobs import JOBS, SCRIPTS, check_job, render
from tests import REPOSITORY

LARGE = ["--config", str(REPOSITORY / "examples" / "configs" / "llama_410m.yaml")]


def options(script: str) -> dict[str, str]:
    lines = script.splitlines()
    count = next(number for number, line in enumerate(lines[1:]) if not line.startswith("#SBATCH "))
    assert not [line for line in lines[count + 1 :] if line.startswith("#SBATCH")]  # sbatch would not read them
    return dict(line.removeprefix("#SBATCH ").partition("=")[::2] for line in lines[1 : count + 1])


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_a_script_that_bash_understands(name, tmp_path):
    arguments = ["--prompt", "a 'b' $c", "--flag"]
    script = render(JOBS[name], Cluster(nodes=4, cpus_per_node=64), arguments, REPOSITORY)
    file = tmp_path / "job.sh"
    file.write_text(script)
    subprocess.run(["bash", "-n", file], check=True)
    # what comes before the example's own lines sets its arguments, whatever is in them
    head = script[: script.index("--flag") + len("--flag")]
    shown = subprocess.run(["bash", "-c", head + '\nprintf "%s\\n" "$@"'], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == arguments
    own = [
        line for line in (SCRIPTS / JOBS[name].script).read_text().splitlines()[1:] if not line.startswith("#SBATCH")
    ]
    for line in own:
        sourced = line.removeprefix("source megatron_ponder/cluster/scripts/")
        assert (line if sourced == line else (SCRIPTS / sourced).read_text()) in script
    assert "\nsource " not in script


@pytest.mark.parametrize("name", JOBS)
def test_every_script_can_be_submitted_as_it_is(name):
    own = options((SCRIPTS / JOBS[name].script).read_text())
    assert {"--job-name", "--nodes", "--ntasks-per-node", "--time", "--output"} <= own.keys()
    assert JOBS[name].rank_per_gpu == (own["--ntasks-per-node"] != "1")
    assert JOBS[name].gpus == ("--gpus-per-node" in own)


def test_one_rank_for_each_gpu():
    cluster = Cluster(account="lab", partition="gpu", nodes=4, gpus_per_node=4, cpus_per_node=64, time="2-0")
    assert options(render(JOBS["train"], cluster, [], REPOSITORY, after=17)) == {
        "--job-name": "train",
        "--nodes": "4",
        "--ntasks-per-node": "4",
        "--gpus-per-node": "4",
        "--cpus-per-task": "16",
        "--time": "2-0",
        "--signal": "B:USR1@300",
        "--requeue": "",
        "--open-mode": "append",
        "--output": f"{REPOSITORY}/runs/slurm/%x-%j.log",
        "--account": "lab",
        "--partition": "gpu",
        "--dependency": "afterok:17",
        "--kill-on-invalid-dep": "yes",
    }


def test_torchrun_is_one_process_a_node():
    script = render(JOBS["train-torchrun"], Cluster(nodes=2, gpus_per_node=4, cpus_per_node=64), [], REPOSITORY)
    asked = options(script)
    assert (asked["--ntasks-per-node"], asked["--gpus-per-node"], asked["--cpus-per-task"]) == ("1", "4", "64")
    assert "export RANKS_PER_NODE=4" in script


def test_other_options_win():
    cluster = Cluster(sbatch=["--exclusive", "--array=0-9", "--nodes=3", "--comment=two words"])
    asked = options(render(JOBS["seeds"], cluster, [], REPOSITORY))
    assert (asked["--array"], asked["--exclusive"], asked["--nodes"]) == ("0-9", "", "3")
    assert asked["--output"].endswith("%x-%A_%a.log")
    assert asked["--comment"] == "'two words'"


def test_a_cluster_without_gpus():
    cluster = Cluster(gpus_per_node=0, ranks_per_node=2)
    assert "--gpus-per-node" not in options(render(JOBS["train"], cluster, [], REPOSITORY))


def test_modules_environment_and_virtual_environment(tmp_path):
    venv = tmp_path / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").touch()
    cluster = Cluster(modules=["cuda/12.8"], environment={"A": "b c"}, venv=str(venv))
    lines = render(JOBS["train"], cluster, [], REPOSITORY).splitlines()
    start = lines.index(f"cd {REPOSITORY}")
    assert lines[start + 1 : start + 3] == ["module load cuda/12.8", f"source '{venv}/bin/activate'"]
    assert "export A='b c'" in lines


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers(tmp_path, runtime):
    cluster = Cluster(container="/images/ponder.sif", container_runtime=runtime, container_mounts=["/scratch"])
    script = render(JOBS["evaluate"], cluster, ["--checkpoint", "runs/a b"], REPOSITORY)
    for name in ("srun", "apptainer"):
        (tmp_path / name).write_text('#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    python = ["python", "-m", "megatron_ponder", "evaluate", "--checkpoint", "runs/a b"]
    if runtime == "pyxis":
        mounts = f"--container-mounts={REPOSITORY}:{REPOSITORY},/scratch"
        image = ["--container-image=/images/ponder.sif", mounts, f"--container-workdir={REPOSITORY}"]
        assert words.splitlines() == ["srun", *image, *python]
    else:
        binds = ["--bind", str(REPOSITORY), "--bind", "/scratch"]
        assert words.splitlines() == ["srun", "apptainer", "exec", "--nv", *binds, "/images/ponder.sif", *python]


@pytest.mark.parametrize(
    ("name", "cluster", "arguments", "message"),
    [
        ("train", Cluster(nodes=2), ["--parallel.tensor=16"], "tensor ranks stay inside a node"),
        ("train", Cluster(nodes=3, gpus_per_node=4), ["--parallel.tensor=8"], "cannot be divided|stay inside a node"),
        ("train-torchrun", Cluster(nodes=3), [], "training.global_batch_size 256 is not a multiple"),
        ("seeds", Cluster(), ["--model.hidden_sise=3"], "did you mean model.hidden_size"),
        ("train", Cluster(), ["--checkpoint.resume=runs/x"], "use --checkpoint.initialize_from"),
    ],
)
def test_a_job_that_could_not_start_is_refused(name, cluster, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        check_job(JOBS[name], cluster, [*LARGE, *arguments])
    assert "\n" not in str(caught.value)


def test_jobs_that_fit():
    check_job(JOBS["train"], Cluster(nodes=4), [*LARGE, "--parallel.tensor=8"])
    check_job(JOBS["train-one-node"], Cluster(nodes=3), LARGE)  # which takes one of them
    check_job(JOBS["evaluate"], Cluster(), ["--checkpoint", "runs/x"])


# The loop that runs a step and puts the job back, without SLURM

STEP = """
squeue() { echo 2030-01-01T00:00:00; }
scontrol() { echo "$@"; }
sleep() { :; }
timeout() { shift; "$@"; }
srun() { return ${NODES_ANSWER:-0}; }
source megatron_ponder/cluster/scripts/step.sh
run_and_requeue %s
"""
RANK = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(int(sys.argv[1])))
print("up", flush=True)
time.sleep(20)
"""


def batch_script(command: str) -> subprocess.Popen:
    script = "\n".join(["SLURM_JOB_ID=42 SLURM_NNODES=2", STEP % command])
    return subprocess.Popen(["bash", "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_a_step_that_ends_is_left_alone():
    for code in (0, 2):
        job = batch_script(f"bash -c 'echo $SLURM_JOB_END_TIME; exit {code}'")
        assert job.communicate(timeout=20)[0] == "1893456000\n" or job.returncode
        assert job.returncode == code


def test_a_step_that_has_saved_goes_back():
    job = batch_script("bash -c 'exit 75'")
    assert job.communicate(timeout=20)[0].endswith("requeue 42\n")


@pytest.mark.parametrize(("code", "answer", "back"), [(1, 1, True), (137, 1, True), (1, 0, False), (2, 1, False)])
def test_a_step_that_has_lost_a_node_goes_back(monkeypatch, code, answer, back):
    monkeypatch.setenv("NODES_ANSWER", str(answer))
    output = batch_script(f"bash -c 'exit {code}'").communicate(timeout=20)[0]
    assert ("a node does not answer: job 42 goes back into the queue\nrequeue 42\n" in output) == back


@pytest.mark.parametrize(("code", "back"), [(75, True), (0, False), (138, True)])
def test_a_signal_reaches_the_step(tmp_path, code, back):
    (tmp_path / "rank.py").write_text(RANK)
    job = batch_script(shlex.join([sys.executable, str(Path(tmp_path / "rank.py")), str(code)]))
    assert job.stdout.readline() == "up\n"
    job.send_signal(subprocess.signal.SIGUSR1)
    assert ("requeue 42" in job.communicate(timeout=10)[0]) == back


def test_a_job_that_is_cancelled_does_not_come_back(tmp_path):
    job = batch_script("bash -c 'trap \"exit 75\" TERM; echo up; while true; do sleep 0.1; done'")
    assert job.stdout.readline() == "up\n"
    subprocess.run(["pkill", "-TERM", "-P", str(job.pid)], check=True)  # SLURM tells the step too
    job.send_signal(subprocess.signal.SIGTERM)
    assert "requeue" not in job.communicate(timeout=10)[0]
    assert job.returncode == 75


# The page


def test_every_job_and_variable_is_on_the_page():
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    for name, job in JOBS.items():
        assert f"| `{name}` | `{job.script}`" in page
    files = ("base/launch.py", "parallel/rendezvous.py", "parallel/gpu_settings.py")
    readers = [REPOSITORY / "megatron_ponder" / name for name in files]
    found = re.findall(r'"([A-Z]+(?:_[A-Z]+)+|RANK)"', "".join(path.read_text() for path in readers))
    assert {"RANK", "SLURM_STEP_NUM_TASKS", "MASTER_PORT"} <= set(found)
    for name in set(found) - {"OMPI_COMM_WORLD_LOCAL_RANK"}:
        assert f"`{name}`" in page
