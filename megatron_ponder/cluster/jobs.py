"""The kinds of jobs, and the script that is submitted for one of them."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.cluster.description import Cluster, check_cluster
from megatron_ponder.config import check_layout, read_config, training_phases

SCRIPTS = Path(__file__).with_name("scripts")
# What the folder of a job may not have in its name: sbatch reads a backslash in its own way, and a container's options
# divide mounts at commas and colons.
UNQUOTABLE = "\\\n\r\t"
UNQUOTABLE_IN_MOUNTS = UNQUOTABLE + ",:"


@dataclass(frozen=True)
class Job:
    """A kind of job.

    Attributes:
        script: its file in `scripts`.
        trains: its arguments are the configuration of a run, which is checked, and it saves before it ends.
        rank_per_gpu: SLURM itself starts every rank; else it starts as many processes as the script says.
        gpus: it computes on GPUs.
        one_node: however many nodes there are, it is for one of them.
    """

    script: str
    trains: bool = False
    rank_per_gpu: bool = False
    gpus: bool = True
    one_node: bool = False


JOBS = {
    "train": Job("train.sh", trains=True, rank_per_gpu=True),
    "train-one-node": Job("train_one_node.sh", trains=True, rank_per_gpu=True, one_node=True),
    "train-torchrun": Job("train_torchrun.sh", trains=True),
    "seeds": Job("seeds.sh", trains=True, rank_per_gpu=True),
    "preprocess": Job("preprocess.sh", gpus=False),
    "generate": Job("generate.sh", gpus=False, one_node=True),
    "evaluate": Job("evaluate.sh", gpus=False, one_node=True),
}


def check_job(job: Job, cluster: Cluster, arguments: Sequence[str]) -> None:
    """Refuse a job that could not start, before it waits in a queue.

    Args:
        job: what is to run.
        cluster: where.
        arguments: of the job.

    Raises:
        UserError: no job could run there; or this one trains, and its configuration is wrong, or its layout does not
            fit nodes × ranks.
    """
    check_cluster(cluster)
    if not job.trains:
        return
    config = read_config(arguments)
    if config.checkpoint.resume not in ("none", "auto"):
        raise UserError(
            "a job goes on from its own run folder whenever it starts (checkpoint.resume auto); to begin with the "
            "weights of another run, use --checkpoint.initialize_from, and to go on from it, --checkpoint.branch_from"
        )
    nodes = 1 if job.one_node else cluster.nodes
    for phase in training_phases(config):
        check_layout(phase.config, Launch(world_size=nodes * cluster.ranks, local_size=cluster.ranks))


def render(job: Job, cluster: Cluster, arguments: Sequence[str], folder: Path, after: int | None = None) -> str:
    """The script to submit: the options of sbatch, the environment, then the job's script with all that it sources.

    So it needs nothing of the place that this package is installed in, and an update does not change a job that waits.

    Args:
        job: what is to run.
        cluster: where.
        arguments: of the job.
        folder: in which the job runs.
        after: number of a job that has to succeed first.

    Raises:
        UserError: the folder has a name that a job cannot use.
    """
    _check_folder(folder, cluster)
    lines = _lines(job.script)
    options = _options([line.split()[1] for line in lines if line.startswith("#SBATCH ")])
    options |= _options(_asked(job, cluster, options, folder))
    if after is not None:
        options |= {"--dependency": f"afterok:{after}", "--kill-on-invalid-dep": "yes"}
    options |= _options(cluster.sbatch)
    if not (job.gpus and cluster.gpus_per_node):
        options.pop("--gpus-per-node", None)
    header = [f"#SBATCH {name}={shlex.quote(value)}" if value else f"#SBATCH {name}" for name, value in options.items()]
    body = [line for line in lines[1:] if not line.startswith("#SBATCH ")]
    while body[0] in ("", "#"):
        body.pop(0)
    return "\n".join(["#!/bin/bash", *header, "", *_environment(cluster, folder), "", _set(arguments), "", *body, ""])


def submit(script: str) -> int:
    """Submit a script; returns the job's number.

    Raises:
        UserError: when there is no SLURM here, or it refuses; says why.
    """
    if not shutil.which("sbatch"):
        raise UserError("there is no sbatch here; submit on a login node of the cluster")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refuses: {' '.join(done.stderr.split())}")
    return int(done.stdout.split(";")[0])


def _lines(script: str) -> list[str]:
    """The lines of a script, with those of a script beside it where that is sourced."""
    lines = (SCRIPTS / script).read_text(encoding="utf-8").splitlines()
    sourced = [_lines(Path(line).name) if line.startswith("source ") else [line] for line in lines]
    return [line for part in sourced for line in part]


def _check_folder(folder: Path, cluster: Cluster) -> None:
    """Refuse a folder that options of sbatch, or mounts of a container, cannot name."""
    for character in UNQUOTABLE_IN_MOUNTS if cluster.container is not None else UNQUOTABLE:
        if character in str(folder):
            raise UserError(
                f"this folder is {str(folder)!r}, and options of jobs cannot have {character!r}; start in another"
            )


def _options(words: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _asked(job: Job, cluster: Cluster, own: dict[str, str], folder: Path) -> list[str]:
    """The options that follow from the description."""
    tasks = cluster.ranks if job.rank_per_gpu else int(own["--ntasks-per-node"])
    pattern = "%x-%A_%a.log" if "--array" in own else "%x-%j.log"
    asked = [
        f"--nodes={1 if job.one_node else cluster.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={cluster.gpus_per_node}",
        f"--time={cluster.time}",
        # in a file's name a % begins a pattern; two of them are one
        f"--output={str(folder / cluster.log_folder).replace('%', '%%')}/{pattern}",
    ]
    if cluster.account is not None:
        asked.append(f"--account={cluster.account}")
    if cluster.partition is not None:
        asked.append(f"--partition={cluster.partition}")
    if cluster.cpus_per_node is not None:
        asked.append(f"--cpus-per-task={cluster.cpus_per_node // tasks}")
    if "--signal" in own:
        asked.append(f"--signal=B:USR1@{cluster.signal_seconds}")
    return asked


def _environment(cluster: Cluster, folder: Path) -> list[str]:
    lines = [f"cd {shlex.quote(str(folder))}"]
    lines += [f"module load {shlex.quote(module)}" for module in cluster.modules]
    if cluster.venv is not None:
        lines.append(f"source {shlex.quote(str(Path(cluster.venv).absolute() / 'bin' / 'activate'))}")
    lines.append(f"export RANKS_PER_NODE={cluster.ranks}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    if cluster.container is None:
        return lines
    if cluster.container_runtime == "pyxis":
        mounts = ",".join([f"{folder}:{folder}", *cluster.container_mounts])
        words = [f"--container-image={cluster.container}", f"--container-mounts={mounts}"]
        return [*lines, _export("SRUN_OPTIONS", [*words, f"--container-workdir={folder}"])]
    binds = [word for mount in [str(folder), *cluster.container_mounts] for word in ("--bind", mount)]
    graphics = ["--nv"] if cluster.gpus_per_node else []
    return [*lines, _export("PYTHON", ["apptainer", "exec", *graphics, *binds, cluster.container, "python"])]


def _export(name: str, words: Sequence[str]) -> str:
    """The line that gives words to `words.sh`, which takes them apart again."""
    return f"export {name}={shlex.quote(shlex.join(words))}"


def _set(arguments: Sequence[str]) -> str:
    """The positional parameters of the script, an option and its value on a line each."""
    lines = ["set --"]
    for word in map(shlex.quote, arguments):
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)
