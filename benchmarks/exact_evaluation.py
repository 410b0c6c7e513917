"""`exact` by sweeps beside the Jacobi passes that come to the same fixed point: seconds, slots and difference.

    python benchmarks/exact_evaluation.py [RUN ...] [--samples 8] [--rounds 3] [--windows 32 64 128 256]

Of trained runs, on samples of their validation part; without any, of the model of `generation.py` in fixed mode, with
random weights, K = 3 and a sequence of 256 random tokens. By the soft mask and the hard rule where there is a router,
fp32, one thread, one batch at a time. Both end where nothing changes by more than 16 units of rounding and take turns;
time is that of this process, so that others on the machine matter little, and the ratio the median over rounds. `slots`
are those run over those that the sequential model runs.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.evaluation.sources import split_batches
from megatron_ponder.model.fixed_point import settle
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.parallel.cpu_settings import prepare_cpu

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.generation import build, prompts
from benchmarks.measuring import by_name, ratio, rounds_of

TOLERANCE = 16 * torch.finfo(torch.float32).eps


def by_passes(model: PonderLM, tokens_BL: Tensor, rule: Rule) -> tuple[Tensor, int]:
    """What the head reads, and how many slots were run, of whole passes until no latent changes."""
    batch, steps, state, slots = model.read(tokens_BL), model.ponder_config.steps, None, 0
    for passes in itertools.count(1):
        result = model.run_pass(batch, state, rule)
        slots += result.hidden_BLSH.shape[:3].numel()
        following = model.next_state(result, rule, min(passes, steps) + 1)
        if passes > steps + 1:
            change = (following.latents - state.latents).abs().max()
            if not change > TOLERANCE * following.latents.abs().max():
                plan = [min(index, steps) + 1 for index in range(passes)]
                return model.output(result, rule, plan).output_BLH, slots
        state = following


def by_sweeps(model: PonderLM, tokens_BL: Tensor, rule: Rule, window: int | None) -> tuple[Tensor, int, int]:
    """The same of sweeps, and the slots of the sequential model."""
    settled = settle(model, *model.read(tokens_BL), rule, TOLERANCE, window)
    least = tokens_BL.numel() * (model.ponder_config.steps + 1)
    if settled.routing is not None and rule.kind == "hard":
        least = int((settled.routing.executed + 1).sum())
    return model.fuse(settled.hidden_BLSH, settled.routing, rule), int(settled.slots_PB.sum()), least


def processor_seconds(action: Callable[[], object]) -> float:
    """Time of this process in one call."""
    begun = time.process_time()
    action()
    return time.process_time() - begun


def measure(name: str, model: PonderLM, batches: Sequence[Tensor], kind: str, arguments: argparse.Namespace) -> None:
    """Print a row for each window."""
    rule = model.rule(kind)
    ways = {None: lambda: [by_passes(model, batch, rule) for batch in batches]}
    ways |= {
        window: lambda window=window: [by_sweeps(model, batch, rule, window) for batch in batches]
        for window in arguments.windows
    }
    timed = {window: lambda way=way: processor_seconds(way) for window, way in ways.items()}
    whole, times = ways[None](), by_name(rounds_of(timed, arguments.rounds))
    for window in arguments.windows:
        swept = ways[window]()
        least = sum(each[2] for each in swept)
        difference = max(float((a[0] - b[0]).abs().max()) for a, b in zip(whole, swept, strict=True))
        slots = [f"{sum(each[1] for each in every) / least:.1f}" for every in (whole, swept)]
        gain = ratio(times[None], times[window])
        cells = (name, kind, window, f"{min(times[None]):.2f}", f"{gain:.2f}", *slots, f"{difference:.0e}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", nargs="+", type=int, default=[32, 64, 128, 256])
    arguments = parser.parse_args()
    prepare_cpu()
    torch.set_num_threads(1)
    print("| model | rule | window | passes [s] | passes / sweeps | slots of passes | of sweeps | difference |")
    print("|---" * 8 + "|")
    if not arguments.runs:
        measure(
            "random, fixed", build("fixed", torch.device("cpu"))[0], [torch.tensor(prompts(1, 256))], "hard", arguments
        )
    for folder in arguments.runs:
        loaded = load_model(folder)
        batches = [batch[:, :-1] for batch in split_batches(loaded, None, "valid", arguments.samples).batches]
        for kind in ("hard",) if loaded.model.router is None else ("soft", "hard"):
            measure(folder.name, loaded.model, batches, kind, arguments)


if __name__ == "__main__":
    main()
