"""Pruned passes that run what they keep, against those that mask the rest: seconds of forward and backward by mean K̂.

    python benchmarks/packed_passes.py [--rounds 5] [--threads 2] [--tokens 256] [--compile]

A llama of 6 blocks (hidden size 256), K = 3, R = 2, batch 2, fp32. The two forms take turns; ratios are medians over
rounds. `predicted` is the ratio of their operations: products of the slots, attention of the pairs, and the head, which
both pay in full; `reached` is measured / predicted. With `--compile` blocks are compiled in both.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from megatron_ponder.config import Config, InferenceConfig, read_config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.cpu_settings import prepare_cpu
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.compiling import compile_blocks
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import StepPlan
from megatron_ponder.training.step_costs import StepCosts

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, in_turn, ratio

BATCH, REFINEMENTS, THRESHOLD = 2, 2, 0.3
# What the router's logits are given for every step, from a router that runs all of them to one that runs next to none.
BIASES = (9.0, 0.5, -1.0, -2.5)


def configuration(tokens: int, compiled: bool) -> Config:
    """Of the model, and of a step of one batch."""
    values = SMALL_LLAMA | {
        "ponder.latent_steps": 3, "data.sequence_length": tokens, "training.global_batch_size": BATCH,
        "training.micro_batch_size": BATCH, "ponder_training.jacobi_iterations": REFINEMENTS,
        "ponder_training.prune_start": 0, "training.compile": compiled,
    }  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in values.items()])


def model_of(config: Config) -> PonderLM:
    """A model whose router tells tokens apart."""
    model = PonderLM(config.model, config.ponder, Mesh(), inference=InferenceConfig(THRESHOLD))
    initialize(model, seed=0)
    with torch.no_grad():
        torch.nn.init.normal_(model.router.output.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    prepare_cpu()
    torch.set_num_threads(arguments.threads)
    config = configuration(arguments.tokens, arguments.compile)
    model, costs, rule = model_of(config), StepCosts(config), Rule("hard", THRESHOLD)
    compile_blocks(model, config, torch.device("cpu"))
    tokens = torch.randint(0, 8192, (BATCH, arguments.tokens + 1), generator=torch.Generator().manual_seed(0))
    objectives = {name: Objective(model, packed=name == "packed") for name in ("masked", "packed")}
    print(f"{arguments.tokens} tokens, K 3, R {REFINEMENTS}, fp32, {arguments.threads} threads\n")
    print("| mean K̂ | masked [s] | masked / packed | predicted | reached | slots run |\n" + "|---" * 6 + "|")
    for bias in BIASES:
        with torch.no_grad():
            model.router.output.bias.copy_(bias * torch.arange(4.0))
        sums = {}

        def step(name: str, sums: dict = sums) -> None:
            loss, of_each = objectives[name](tokens, REFINEMENTS, rule)
            sums[name] = Tally.of(of_each.sum(0))
            loss.backward()
            model.zero_grad()

        times = in_turn({name: lambda name=name: step(name) for name in objectives}, arguments.rounds)
        plan = StepPlan(0.0, REFINEMENTS, rule, 0.0)
        predicted = costs.flops(plan, sums["masked"]) / costs.flops(plan, sums["packed"])
        faster = ratio(times["masked"], times["packed"])
        cells = (
            sums["packed"].mean_steps, statistics.median(times["masked"]), faster, predicted, faster / predicted,
            sums["packed"].slots / sums["masked"].slots,
        )  # fmt: skip
        print("| " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
