"""Write the configuration of a new run: a size of model, a mode, and a layout that fits.

    ponder new --size llama-410m --gpu H100-SXM --gpus 8 --output run.yaml
    ponder new --size pythia-70m --mode vanilla --gpus 1 --memory-gib 24 --output run.yaml
    ponder new --size llama-1.4b --cluster examples/clusters/h100.yaml --tokens 30e9 --output run.yaml
    ponder new --size tiny --cpu --output run.yaml

Every key stands below what it means, and the beginning of the file says which commands come next. Micro-batch,
recompute, ZeRO stage and grid are the fastest that ponder estimate --search finds to fit; no GPU has timed them. Keys
of the configuration may follow as --section.key value; they are written too.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import check_output, write_atomically
from megatron_ponder.base.launch import one_process
from megatron_ponder.cluster.hardware import Hardware, hardware_of
from megatron_ponder.cluster.machine_options import add_machine_options, chosen_cluster, machine_words
from megatron_ponder.config import Config
from megatron_ponder.config.commented import commented_yaml
from megatron_ponder.config.known_sizes import SIZES, size_of
from megatron_ponder.config.ponder import Mode
from megatron_ponder.estimates.budget import TOKENS


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, find a layout, write the file."""
    parser = Parser("new", __doc__)
    parser.add_argument("--size", required=True, help=f"of the model: {', '.join(SIZES)}")
    parser.add_argument(
        "--mode", choices=get_args(Mode), default="adaptive", help="of latent steps (default: adaptive)"
    )
    parser.add_argument("--tokens", type=TOKENS, help="to train on (default: 20 for each parameter)")
    parser.add_argument("--output", type=Path, required=True, help="file to write, which must not exist")
    parser.add_argument("--cpu", action="store_true", help="one process on the processors of this machine")
    add_machine_options(parser)
    arguments, overrides = parser.parse_with_overrides(argv)
    size, words = size_of(arguments.size), machine_words(arguments)
    _check(arguments, words)

    from megatron_ponder.estimates import new_run  # now, so that a wrong command line is answered at once

    cluster = None if arguments.cpu else chosen_cluster(arguments)
    ranks = 1 if cluster is None else cluster.nodes * cluster.ranks
    name = f"{arguments.size.lower()}-{arguments.mode}"
    config, keys = new_run.new_run(name, size, arguments.mode, ranks, overrides, arguments.tokens, arguments.cpu)
    if cluster is None:
        hardware = new_run.this_processor(arguments.memory_gib)
    else:
        cluster, like = new_run.with_a_gpu(cluster, config.training.precision)
        hardware, words = hardware_of(cluster, config.training.precision), [*like, *words]
    plan = new_run.best_layout(config, hardware, overrides)
    said = new_run.expected(name, plan, hardware)
    comments = [*said, "", "What comes next:", *_next(arguments.output, words, hardware, plan.config)]
    write_atomically(arguments.output, commented_yaml(plan.config, keys, "\n".join(comments)))
    print(f"{arguments.output}:", *said, *comments[len(said) :], sep="\n")


def _check(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists already; choose another --output, or remove it")
    check_output(arguments.output)
    others = [word for word in words[::2] if word != "--memory-gib"]
    if arguments.cpu and others:
        raise UserError(f"--cpu and {others[0]} are two machines; leave one out")
    if not arguments.cpu and not words:
        raise UserError("say which machine: --gpu H100-SXM --gpus 8, --gpus 1 --memory-gib 24, --cluster FILE or --cpu")


def _next(output: Path, words: Sequence[str], hardware: Hardware, config: Config) -> list[str]:
    """Commands that follow, from raw text to a model that is used."""
    file, run_dir = shlex.quote(str(output)), shlex.quote(config.training.run_dir)
    tokenizer = config.tokenizer.path
    prefix = config.data.path if isinstance(config.data.path, str) else "data/corpus"
    made = shlex.join(["--output-prefix", prefix.removesuffix("_text_document"), "--tokenizer", tokenizer])
    trained = shlex.join(
        ["--output-prefix", tokenizer.removesuffix(".model"), "--vocab-size", f"{config.model.vocab_size}"]
    )
    if hardware.nodes > 1:
        cluster = words[words.index("--cluster") + 1] if "--cluster" in words else "cluster.yaml"
        train = f"submit --cluster {shlex.quote(cluster)} --nodes {hardware.nodes} --submit train --config {file}"
    elif hardware.gpus_per_node > 1:
        train = f"torchrun --nproc_per_node {hardware.gpus_per_node} -m megatron_ponder train --config {file}"
    else:
        train = f"train --config {file}"
    commands = [
        f"train-tokenizer --input corpus/ {trained}",
        f"preprocess --input corpus/ {made} --append-eod",
        *([] if hardware.device == "cpu" else [f"estimate --config {file} {shlex.join(words)}"]),
        train,
        f"status {run_dir}",
        f"generate --checkpoint {run_dir} --prompt 'Once upon a time'",
        f"export-hf --checkpoint {run_dir} --output exported",
    ]
    return [f"  ponder {command}" for command in commands]
