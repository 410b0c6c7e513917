"""Stage `faults` of `gpu.py`: what must not go wrong on a GPU, which computes behind the host's back."""

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from benchmarks.gpu_bench import Bench, CannotRunError, Case, Numbers
from benchmarks.gpu_training import REFINEMENTS, Step, alone, configured
from megatron_ponder.base.launch import discover
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.objective import Objective

PATIENCE = 120  # seconds until all ranks have ended
RAISING = "from benchmarks.gpu_faults import raise_on_a_rank; raise_on_a_rank()"


def fault_cases(tiny: bool) -> dict[str, Case]:
    """Cases by name."""
    return {"a weight that is no number": skip_a_step, "bf16 beside fp32": compare_precisions, "a rank raises": end_all}


def skip_a_step(bench: Bench) -> dict[str, Numbers]:
    """A step with a weight that is no number must be skipped, and the next one taken.

    Raises:
        AssertionError: it is not so.
    """
    result = {}
    for mode in ("vanilla", "adaptive"):
        with alone(bench) as mesh:
            step = Step(configured(mode, bench), mesh)
            before = step()
            weight = next(parameter for name, parameter in step.engine.model.named_parameters() if "norm" in name)
            kept = weight.detach().clone()
            weight.data.fill_(math.nan)
            spoilt = step()
            weight.data.copy_(kept)
            after = step()
        assert math.isfinite(before) and math.isfinite(after), (before, after)
        assert not math.isfinite(spoilt), f"a step with weights that are no numbers has the norm {spoilt}"
        result[mode] = {"norm before": before, "norm skipped": str(spoilt), "norm after": after}
    return result


def compare_precisions(bench: Bench) -> dict[str, Numbers]:
    """Loss and gradients in bf16 beside those in fp32, of the same weights and tokens.

    Raises:
        AssertionError: they are further apart than rounding explains.
    """
    result = {}
    for mode in ("vanilla", "adaptive"):
        config = configured(mode, bench)
        with alone(bench) as mesh:
            exact, exact_gradients = loss_and_gradients(config, mesh, torch.float32)
            rounded, gradients = loss_and_gradients(config, mesh, torch.bfloat16)
        shares = {
            name: float((gradients[name].float() - gradient).norm() / gradient.norm())
            for name, gradient in exact_gradients.items()
            if float(gradient.norm()) > 0
        }
        worst = max(shares, key=shares.__getitem__)
        middle = statistics.median(shares.values())
        loss = {"loss": exact, "loss off": abs(rounded / exact - 1)}
        result[mode] = loss | {"gradients off": middle, "at most": shares[worst], "of": worst}
        assert abs(rounded / exact - 1) < 0.02, result[mode]
    return result


def loss_and_gradients(config, mesh, dtype: torch.dtype) -> tuple[float, Mapping[str, torch.Tensor]]:
    """Of one micro-batch, by PyTorch alone."""
    model = build_part(config, mesh)
    initialize(model, seed=0)
    objective = Objective(model.to(mesh.device, dtype))
    shape = (config.training.micro_batch_size, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    loss, _ = objective(tokens.to(mesh.device), REFINEMENTS, model.rule("soft", bias=0.0), 0.01)
    (loss / tokens[:, 1:].numel()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss) / tokens[:, 1:].numel(), gradients


def end_all(bench: Bench) -> dict[str, Numbers]:
    """Seconds from the raise of one rank until all have ended, while the others wait for it in a collective.

    Raises:
        CannotRunError: there is no GPU.
        AssertionError: they have not ended, or ended well.
    """
    if bench.device.type == "cpu":
        raise CannotRunError("needs a GPU")
    count, port = min(2, torch.cuda.device_count()), discover().port
    ranks = [start_rank(rank, count, port) for rank in range(count)]
    try:
        outputs = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    ended = time.time()
    raised = float(next(line for line in outputs[-1].splitlines() if line.startswith("raised at ")).split()[-1])
    codes = [rank.returncode for rank in ranks]
    assert 0 not in codes, f"exit codes {codes}"
    assert "RuntimeError: on purpose" in outputs[-1], outputs[-1][-1000:]
    return {f"{count} ranks": {"seconds until all have ended": ended - raised, "exit codes": str(codes)}}


def start_rank(rank: int, count: int, port: int) -> subprocess.Popen:
    """A process that runs `raise_on_a_rank`."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    words = [sys.executable, "-c", RAISING]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def raise_on_a_rank() -> None:
    """Raise on the last rank, while work is queued on its device and the others wait for it."""
    launch = discover()
    with process_group(launch) as device:
        numbers = torch.ones(1 << 20, device=device)
        dist.all_reduce(numbers)
        if launch.rank == launch.world_size - 1:
            print(f"raised at {time.time()}", flush=True)
            raise RuntimeError("on purpose")
        dist.all_reduce(numbers)
        numbers.sum().item()
