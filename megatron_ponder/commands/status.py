"""Say how runs are doing: step, loss, rate, time left, last checkpoint, restarts.

    ponder status runs/quickstart
    ponder status runs/* --watch 10
    ponder status runs/quickstart --json

Reads run folders and nothing else, so that it works from any machine that sees them, during a run and after it. What
is no run is left out, with a line on stderr. The exit code is 1 if a run is silent: it should have written something
and has not.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.durations import format_duration
from megatron_ponder.base.errors import UserError, command, describe
from megatron_ponder.config.command_options import Number
from megatron_ponder.config.declarations import SECONDS, Range
from megatron_ponder.runs.status import RunStatus, run_status


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, read the folders, print a table or JSON."""
    parser = Parser("status", __doc__)
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a folder that training writes into")
    parser.add_argument("--json", action="store_true", help="one JSON object a run, each on a line of its own")
    seconds = Number("watch", float, Range(0, SECONDS, above=True))
    parser.add_argument("--watch", type=seconds, metavar="SECONDS", help="show the table anew every so many seconds")
    arguments = parser.parse_args(argv)
    if arguments.watch is not None and arguments.json:
        raise UserError("--watch shows a table; leave --json out")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # as wide as the table needs, whatever the reader of a pipe takes
    if arguments.watch is not None:
        read_runs(arguments.run_dirs)  # says once what is left out
        watch(arguments.run_dirs, arguments.watch, console)
        return
    found = read_runs(arguments.run_dirs)
    if arguments.json:
        for status in found:
            print(json.dumps(status.as_dict()))
    else:
        console.print(table_of(found))
    sys.exit(any(status.state == "silent" for status in found))


def read_runs(run_dirs: list[Path], say: bool = True) -> list[RunStatus]:
    """How those of the folders are doing that are runs; the others are left out.

    Args:
        run_dirs: folders, among which there may be other things, as in `runs/*`.
        say: on stderr what is left out and why.

    Raises:
        UserError: none of them is a run.
    """
    found, others = [], []
    for run_dir in run_dirs:
        try:
            found.append(run_status(run_dir))
        except (UserError, OSError) as error:
            others.append(describe(error))
    if not found:
        more = f" (and {len(others) - 1} more that are none)" if len(others) > 1 else ""
        raise UserError(others[0] + more)
    for other in others if say else ():
        print(f"left out: {other}", file=sys.stderr)
    return found


def watch(run_dirs: list[Path], seconds: float, console: Console) -> None:
    """Show the table until interrupted, or until every run has finished."""
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                found = read_runs(run_dirs, say=False)
                live.update(table_of(found), refresh=True)
                if all(status.state == "finished" for status in found):
                    return
                time.sleep(seconds)
        except KeyboardInterrupt:
            return


def table_of(found: list[RunStatus]) -> Table:
    """A column for each run, a line for each thing that is known of one."""
    table = Table("run", *(status.run_dir for status in found))
    rows = [lines_of(status) for status in found]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(name, *(row.get(name, "–") for row in rows))
    return table


def lines_of(status: RunStatus) -> dict[str, str]:
    """What is known of a run, in words."""
    age = "" if status.age is None else f", last record {format_duration(status.age)} ago"
    why = f" ({status.end})" if status.state == "stopped" else ""
    lines = {"state": status.state + why + age}
    if status.step == 0:
        return lines | _quality(status) | _saved(status)
    lines["step"] = f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})"
    lines["loss"] = _number(status.loss)
    lines |= _quality(status)
    if status.mean_latent_steps is not None:
        lines["latent steps/token"] = f"{status.mean_latent_steps:.2f}"
    if status.latent_scale is not None:
        lines["factor on latents"] = f"{status.latent_scale:.4f}"
    if status.training_flops is not None:
        lines["training compute"] = f"{status.training_flops:.3g} FLOPs"
    if status.tokens_per_second is not None:
        used = "" if status.mfu is None else f", MFU {status.mfu:.1%}"
        lines["rate"] = f"{status.tokens_per_second:,.0f} tokens/s{used}"
    if status.seconds_left is not None:
        lines["left"] = format_duration(status.seconds_left)
    if status.slowest_rank is not None:
        lines["slowest rank"] = f"{status.slowest_rank}, {status.slowest_over_median:.2f} × the median"
    return lines | _saved(status)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _quality(status: RunStatus) -> dict[str, str]:
    losses = {}
    if status.validation_step is not None:
        losses["validation loss"] = status.validation_loss
    losses |= {f"validation loss, {name}": loss for name, loss in status.validation_losses.items()}
    when = f"after step {status.validation_step:,}" if status.validation_step else "before the first step"
    lines = {name: f"{_number(loss)} {when}" for name, loss in losses.items()}
    if status.exact_loss is not None:
        trained = None if status.exact_gap is None else status.exact_loss - status.exact_gap
        lines["validation by exact"] = f"{_number(status.exact_loss)}, with R of training {_number(trained)}"
    for name, value in status.task_scores.items():
        lines[name.replace("/", " ")] = f"{_number(value)} after step {status.task_step:,}"
    return lines


def _saved(status: RunStatus) -> dict[str, str]:
    lines = {"checkpoint": "none"}
    if status.checkpoint is not None:
        whole = "complete" if status.checkpoint.complete else "damaged: files are missing or cut off"
        whole += ", exported" * status.checkpoint.exported
        kept = f"; {status.checkpoint.kept} are kept" if status.checkpoint.kept > 1 else ""
        lines["checkpoint"] = f"{status.checkpoint.name}, {format_duration(status.checkpoint.age)} ago, {whole}{kept}"
    if status.saving is not None:
        lines["unfinished save"] = status.saving
    if status.starts is not None:
        start = status.last_start
        reason = f", the last after step {start['step']}" if "step" in start else ""
        reason += f" on {start['host']}" if start.get("host") else ""
        ended = start.get("reason") or start.get("previous")
        reason += f" ({ended})" if ended else ""
        lines["restarts"] = f"{status.restarts}{reason if status.restarts else ''}"
    return lines
