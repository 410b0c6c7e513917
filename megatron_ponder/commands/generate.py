"""Continue prompts with a trained model, showing how many latent steps each token got.

    ponder generate --checkpoint runs/quickstart --prompt "def main():" --max-new-tokens 60
    ponder generate --checkpoint runs/quickstart --prompts-file prompts.jsonl --output results.jsonl
    ponder generate --checkpoint runs/quickstart --interactive --temperature 0.8
    torchrun --nproc_per_node 4 -m megatron_ponder generate --checkpoint runs/quickstart --tensor 2 --pipeline 2

Also under srun and mpirun. Ranks beyond one copy of the model are further copies, which share the prompts.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.environment import without_local_rank
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.launch import Launch, discover
from megatron_ponder.config.command_options import add_options, from_options
from megatron_ponder.generation.interactive import converse, line_source
from megatron_ponder.generation.loading import CheckedSetup, Setup, check_setup, load_generator
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.prompt_lists import Summary, begin_file, print_results, write_results
from megatron_ponder.generation.prompts import STANDARD_INPUT, Prompt, Task, read_prompts, tasks_of, text_prompts
from megatron_ponder.generation.ranks import LACKING, joined
from megatron_ponder.generation.results import LinePrinter, ResultFile
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.generation.shading import ShadedPrinter, steps_line
from megatron_ponder.parallel.collectives import from_first


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("generate", __doc__, LACKING)
    add_options(parser, Setup, "checkpoint")

    given = parser.add_argument_group("prompts; without any, standard input is one")
    given.add_argument("--prompt", nargs="+", help="one or several texts to continue; - for all of standard input")
    given.add_argument("--prompts-file", type=Path, help="JSON lines, each with its own options if need be; or -")
    given.add_argument("--interactive", action="store_true", help="continue one line after another as you type them")

    out = parser.add_argument_group("results")
    out.add_argument("--output", type=Path, help="write them to this file, as JSON lines in the order of the prompts")
    out.add_argument("--json", action="store_true", help="print them as JSON lines; so are those of a file of prompts")
    out.add_argument("--stream", action="store_true", help="print tokens as they come")

    add_options(parser.add_argument_group("continuations"), Options)

    work = parser.add_argument_group("computation")
    add_options(work, Setup, "threshold", "router_bias", "confidence_exit")
    work.add_argument("--prefill", choices=("jacobi", "sequential"), default="jacobi", help="how prompts are read")
    add_options(work, Prefill, "refinements", "tolerance", "chunk")
    add_options(work, Batching, "max_sequences", "max_slots")
    add_options(work, Setup, "precision", "tensor", "pipeline")
    return parser.parse_args(without_local_rank(argv))


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, generate, print."""
    arguments = parse_arguments(argv)
    launch = discover()
    with joined(launch) as device:
        options, checked, tasks, done = from_first(partial(check, arguments, launch, device))
        generator, loaded, mesh = load_generator(checked, launch, device)
        first, console = launch.rank == 0, Console(soft_wrap=True, highlight=False)
        if arguments.interactive:
            with generator:
                if generator.drives:
                    converse(generator, options, loaded.tokenizer, console, line_source(console))
        elif arguments.output is not None:
            summary = write_results(generator, mesh, tasks, ResultFile(arguments.output), done, silent=not first)
            close(summary, len(tasks), console if first else None, arguments.output)
        elif arguments.json or arguments.prompts_file is not None:
            summary = print_results(generator, mesh, tasks, LinePrinter(tasks))
            close(summary, len(tasks), Console(stderr=True, soft_wrap=True, highlight=False) if first else None)
        else:
            after = partial(steps_line, tokenizer=loaded.tokenizer)
            summary = print_results(
                generator, mesh, tasks, ShadedPrinter(console, loaded.tokenizer, arguments.stream, after=after)
            )
            close(summary, len(tasks), console if first else None)


def check(
    arguments: argparse.Namespace, launch: Launch, device: torch.device
) -> tuple[Options, CheckedSetup, list[Task], set[int]]:
    """Read all input and refuse what cannot be, on the first rank, before anything is computed.

    Returns:
        Options of prompts that do not say otherwise, what is known of the generator, what is to be generated, and which
        of it is done already.
    """
    options, setup = from_options(Options, arguments), read_setup(arguments)
    prompts = read_input(arguments, options)
    checked = check_setup(setup, launch, device, copies=not (arguments.interactive or arguments.stream))
    tokenizer = checked.tokenizer()
    if tokenizer is None and arguments.interactive:
        raise UserError(f"{checked.folder} has no tokenizer; train with tokenizer.path set to generate text")
    tasks = tasks_of(prompts, tokenizer, checked.request_check(tokenizer))
    done = set() if arguments.output is None else begin_file(ResultFile(arguments.output), checked, tasks)
    return options, checked, tasks, done


def read_setup(arguments: argparse.Namespace) -> Setup:
    """What is wanted of the generator."""
    if arguments.prefill == "sequential" and (arguments.refinements is not None or arguments.tolerance is not None):
        raise UserError("--refinements and --tolerance are for --prefill jacobi; leave them out")
    prefill = from_options(Prefill, arguments) if arguments.prefill == "jacobi" else None
    return from_options(Setup, arguments, batching=from_options(Batching, arguments, prefill=prefill))


def read_input(arguments: argparse.Namespace, options: Options) -> list[Prompt]:
    """The prompts, from wherever they are; none where they are asked for one by one."""
    if arguments.stream and (arguments.json or arguments.output or arguments.prompts_file):
        raise UserError("--stream prints texts; leave out --json, --output and --prompts-file")
    if arguments.interactive:
        if arguments.prompt or arguments.prompts_file or arguments.output or arguments.json:
            raise UserError("--interactive asks for prompts and prints texts; leave out --prompt, files and --json")
        return []
    if arguments.prompts_file is None:
        return text_prompts(arguments.prompt or [STANDARD_INPUT], options)
    if arguments.prompt:
        raise UserError("--prompt and --prompts-file exclude each other; write all prompts into the file")
    return read_prompts(arguments.prompts_file, options)


def close(summary: Summary, tasks: int, console: Console | None, file: Path | None = None) -> None:
    """Print the closing line, unless another rank does; end with 130 after an interruption, 2 after failures."""
    if console is not None:
        console.print(summary.totals.closing_line(summary.seconds), style="bold")
    if summary.finished < tasks:
        if console is not None:
            more = "" if file is None else f"; with the same command {file} goes on"
            print(f"interrupted after {summary.finished:,} of {tasks:,} sequences{more}", file=sys.stderr)
        sys.exit(130)
    if summary.totals.failed:
        if console is not None:
            where = "" if file is None else f" in {file}"
            print(
                f"error: {summary.totals.failed:,} of {tasks:,} sequences failed; their error{where} says why",
                file=sys.stderr,
            )
        sys.exit(2)
