"""Pipelines that run what pruned passes keep, against those that mask the rest: counted on paper, and on two ranks.

    python benchmarks/packed_pipeline.py [--rounds 3] [--length 128]

On paper, the schedules that run are played through with K = 3, R = 2 and passes that take as long as the slots that
they keep: 30, 15 and 5 % of the tokens have a first, a second and a third latent step, and their shares in a
micro-batch differ by up to a fifth either way. `busy` is the share of a step in which ranks compute, `work` and `time`
are those of the masked form's.

Then two ranks of one thread each run forward and backward of a llama (hidden size 128, 4 blocks, K = 3, R = 2, four
micro-batches of two sequences, fp32) in both forms, which take turns; ratios are medians over rounds. `slots`
and `pairs` are of slots that are run, and of those that see each other. Messages are of the same size in both forms.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ponder.base.launch import discover
from megatron_ponder.config import read_config
from megatron_ponder.estimates.schedule_walk import COSTS, Action, orders, step_length
from megatron_ponder.model.build import build_part
from megatron_ponder.model.passes import pass_slots
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import build_mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import by_name, on_ranks, ratio, rounds_of

STEPS, REFINEMENTS, SHARES, SPREAD = 3, 2, (0.3, 0.15, 0.05), 0.2
PLAN = pass_slots(STEPS, REFINEMENTS)
BATCH, MICRO_BATCHES, THRESHOLDS = 2, 4, (0.1, 0.5)


class Step(NamedTuple):
    """Forward and backward of a step on one rank: wall time and processor time in seconds, and what was run."""

    wall: float
    processor: float
    tally: Tally


def print_counted() -> None:
    """A line for each schedule and size of a pipeline."""
    for kind, (ranks, micro_batches) in product(("1f1b", "zero_bubble"), ((2, 4), (4, 8), (8, 16))):
        actions, draw = orders(kind, ranks, micro_batches, len(PLAN)), random.Random(0)
        factors = [1 + SPREAD * draw.uniform(-1, 1) for _ in range(micro_batches)]
        kept = [[1 + sum(factor * share for share in SHARES[: slots - 1]) for slots in PLAN] for factor in factors]
        forms = {"masked": [PLAN] * micro_batches, "packed": kept}
        work = {name: (COSTS["F"] + COSTS["B"]) * sum(map(sum, slots)) for name, slots in forms.items()}
        length = {name: step_length(actions, partial(_duration, slots, ranks)) for name, slots in forms.items()}
        busy = ", ".join(f"{name} {work[name] / length[name]:.1%} busy" for name in forms)
        times = f"work {work['packed'] / work['masked']:.2f}, time {length['packed'] / length['masked']:.2f}"
        print(f"{kind}, {ranks} ranks, {micro_batches} micro-batches: {busy}; {times}")


def _duration(slots: Sequence[Sequence[float]], ranks: int, action: Action) -> float:
    """Of an action, from slots a token of every micro-batch and pass."""
    return COSTS[action.kind] * slots[action.micro_batch][action.stage // ranks]


def measure(rounds: int, length: int) -> dict[tuple[float, bool], list[Step]]:
    """Steps by threshold and whether they pack, as this rank sees them."""
    values = {
        "model.hidden_size": 128, "model.num_heads": 4, "model.ffn_hidden_size": 512, "model.num_layers": 4,
        "model.vocab_size": 512, "ponder.latent_steps": STEPS, "data.sequence_length": length,
        "training.global_batch_size": BATCH * MICRO_BATCHES, "training.micro_batch_size": BATCH,
        "training.precision": "fp32", "parallel.pipeline": 2, "parallel.zero_stage": 0,
    }  # fmt: skip
    config = read_config([f"--{key}={value}" for key, value in values.items()])
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        mesh = build_mesh(device, config.parallel)
        model = build_part(config, mesh)
        initialize(model, seed=0)
        if model.router is not None:
            with torch.no_grad():  # so that tokens differ
                torch.nn.init.normal_(model.router.output.weight, std=0.3, generator=torch.Generator().manual_seed(0))
                model.router.output.bias.copy_(torch.tensor([1.5, 0.0, 0.0, 0.0]))
        objective = Objective(model)
        engine = Engine(objective, config, mesh)
        shape = (BATCH * MICRO_BATCHES, length + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

        def step(threshold: float, packed: bool) -> Step:
            objective.packed = packed
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            rule = model.rule("hard", threshold)
            sums = engine.forward_backward(tokens.split(BATCH), REFINEMENTS, rule, 0.0, 1.0)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            engine.step(0.0)
            return Step(wall, processor, Tally.of(sums))

        cases = list(product(THRESHOLDS, (False, True)))
        return by_name(rounds_of({case: lambda case=case: step(*case) for case in cases}, rounds))


def print_measured(rounds: int, length: int) -> None:
    """A line for each threshold."""
    ranks = on_ranks(2, measure, rounds, length)
    for threshold in THRESHOLDS:
        masked, packed = ([ranks[rank][threshold, form] for rank in ranks] for form in (False, True))
        tally, whole = packed[0][0].tally, masked[0][0].tally
        ratios = [ratio([s.wall for s in packed[0]], [s.wall for s in masked[0]])]
        for one, other in zip(packed, masked, strict=True):
            ratios.append(ratio([s.processor for s in one], [s.processor for s in other]))
        wall, first, last = ratios
        counts = f"slots {tally.slots / whole.slots:.2f}, pairs {tally.pair_work / whole.pair_work:.2f}"
        print(
            f"mean K̂ {tally.mean_steps:.2f}: {counts}; wall time {wall:.2f}; processor time of ranks {first:.2f}, "
            f"{last:.2f}; losses differ by {abs(tally.cross_entropy / whole.cross_entropy - 1):.0e}"
        )


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    print_counted()
    print_measured(arguments.rounds, arguments.length)


if __name__ == "__main__":
    main()
