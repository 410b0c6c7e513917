"""Write the script of a SLURM job, show it, and with --submit submit it.

    ponder submit --cluster FILE.yaml train --config FILE.yaml --parallel.tensor 8
    ponder submit --cluster FILE.yaml --nodes 16 --submit train --config FILE.yaml --parallel.tensor 8
    ponder submit --cluster FILE.yaml --after 4711 --submit evaluate --checkpoint runs/x

As with sbatch, options come before the job, the arguments of the job after it, and the job runs in the folder that it
is submitted in. Jobs: train, train-one-node, train-torchrun, seeds, preprocess, generate, evaluate.

Options:
  --cluster FILE        the description of a cluster, of which examples/slurm/cluster.yaml has every key
  --after JOB           begin when the job with this number has succeeded
  --submit              submit the script that is shown
"""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax

from megatron_ponder.base.command_line import version_line
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.launch import one_process
from megatron_ponder.cluster.description import OF_ESTIMATES, options_help, read_cluster
from megatron_ponder.cluster.jobs import JOBS, check_job, render, submit
from megatron_ponder.hf.starting_point import complete


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, check the job, show its script, submit it if that is wanted."""
    if {"-h", "--help"} & set(takewhile(lambda word: word not in JOBS, argv)):
        print(__doc__.strip(), options_help(), sep="\n\n")
        return
    if argv[:1] == ["--version"]:
        print(version_line())
        return
    options, name, arguments = _split(argv)
    wanted = "--submit" in options
    after = _take(options, "--after")
    cluster = read_cluster([option for option in options if option != "--submit"], unread=OF_ESTIMATES)
    job = JOBS[name]
    # Jobs go on from their own run folder.
    check_job(job, cluster, complete(["--checkpoint.resume=auto", *arguments]) if job.trains else arguments)
    script = render(job, cluster, arguments, Path.cwd(), after)
    console = Console(soft_wrap=True)
    if console.is_terminal:
        console.print(Syntax(script, "bash", background_color="default"))
    else:
        print(script)
    if wanted:
        Path(cluster.log_folder).mkdir(parents=True, exist_ok=True)
        print(f"submitted job {submit(script)}")
    elif console.is_terminal:
        console.print("[dim]nothing was submitted; add --submit before the job")


def _split(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Our own options, the name of the job, and what comes after it."""
    position = 0
    while position < len(words) and words[position].startswith("--"):
        position += 1 if words[position] == "--submit" or "=" in words[position] else 2
    if position >= len(words) or words[position] not in JOBS:
        found = f'"{words[position]}" is no job; ' if position < len(words) else ""
        raise UserError(f"{found}name one after the options: {', '.join(JOBS)}")
    return list(words[:position]), words[position], list(words[position + 1 :])


def _take(options: list[str], name: str) -> int | None:
    """The number given for an option, which is taken out."""
    for position, option in enumerate(options):
        if option == name or option.startswith(f"{name}="):
            value = option.partition("=")[2] or options.pop(position + 1)
            options.pop(position)
            if not value.isdigit():
                raise UserError(f"{name} takes the number of a job, not {value}")
            return int(value)
    return None
