"""Expected memory against real models, real schedules and the tensors that really stay alive."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_ponder.config import Config
from megatron_ponder.config.deepspeed import BUCKET
from megatron_ponder.estimates.activations import most_in_flight, pass_bytes, passes
from megatron_ponder.estimates.memory import (
    held_gradient_bytes,
    loss_bytes,
    memory_estimate,
    optimizer_bytes,
    running_moments,
    update_bytes,
)
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.estimates.schedule_walk import stages_on_paper
from megatron_ponder.kernels import cross_entropy
from megatron_ponder.model.build import build_part
from megatron_ponder.model.ends import Head
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from tests.distributed import run_distributed
from tests.models import LEARNED, random_tokens, small_config

BATCH, LENGTH, VOCABULARY, R = 2, 48, 500, 1
HALF_A_BUCKET = BUCKET  # bytes; of a whole one the system hands out the pages that are used


def config_for(**overrides) -> Config:
    values = {
        "model__hidden_size": 128,
        "model__num_layers": 3,
        "model__ffn_hidden_size": 352,
        "model__vocab_size": VOCABULARY,
        "data__sequence_length": LENGTH,
        "ponder_training__jacobi_iterations": R,
        "training__micro_batch_size": BATCH,
        "training__global_batch_size": BATCH,
        "training__precision": "fp32",
    }
    return small_config(**(values | overrides))


class Alive(TorchDispatchMode):
    """Bytes of all tensors that operations inside have made and that somebody still holds.

    Attributes:
        now: at this moment.
        most: since it was last set.
    """

    def __init__(self, parameters: int = 0) -> None:
        """Watch; of DeepSpeed's buckets so many numbers are filled."""
        super().__init__()
        self.now = self.most = 0
        self._filled = parameters / BUCKET
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor) and item.device.type == "cpu":
                self._see(item.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        if size >= HALF_A_BUCKET:
            size = int(size * self._filled)
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


# Activations


def forward_and_backward(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Bytes that a micro-batch's forward leaves for the backward pass, and the most until that has ended."""
    torch.set_flush_denormal(True)
    model = build_part(config, mesh, eod_id=3)
    initialize(model, seed=0)
    model.to(torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    objective = Objective(model, config.ponder_training.gradient_passes)
    tokens = random_tokens(BATCH, LENGTH // mesh.context.size + 1, VOCABULARY)
    parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
    with Alive() as alive:
        for parameter in model.parameters():
            parameter.detach()  # seen, so that their views are not taken for something new
        assert alive.now == parameters
        loss, _ = objective(tokens, R, model.rule("soft"))
        left = alive.now - parameters
        loss.backward()
    torch.set_flush_denormal(False)
    return left, alive.most - parameters


ACTIVATIONS = [
    {},
    {"model__family": "gpt_neox", "model__ffn_hidden_size": 512},
    {"model__family": "gpt_neox", "model__residual": "sequential"},
    {"model__num_kv_heads": 2} | LEARNED,
    {"model__qk_norm": "true", "model__head_size": 48},
    {"ponder__mode": "fixed"} | LEARNED,
    {"ponder__mode": "vanilla"},
    {"ponder__mode": "pause"},
    {"ponder__mode": "sps"},
    {"ponder__latent_visibility": "own"},
    {"ponder__latent_visibility": "own", "ponder__mode": "fixed", "data__reset_at_eod": "true"},
    {"ponder__latent_visibility": "own", "model__num_kv_heads": 2} | LEARNED,
    {"ponder__latent_visibility": "own", "training__recompute": "block"},
    {"ponder__latent_visibility": "own", "training__recompute": "attention"},
    {"ponder__latent_visibility": "own", "ponder_training__gradient_passes": 2},
    {"ponder__mode": "loop", "model__family": "gpt_neox"},
    {"ponder__mode": "ponderlm"},
    {"ponder__mode": "ponderlm", "training__recompute": "block"},
    {"ponder_training__gradient_passes": 2},
    {"data__reset_at_eod": "true"},
    {"training__attention_kernel": "value_side"},
    {"training__attention_kernel": "value_side", "model__num_kv_heads": 2},
    {"training__recompute": "block"},
    {"training__recompute": "attention"},
    {"training__recompute": "attention", "model__family": "gpt_neox", "ponder__mode": "fixed"},
    {"training__recompute": "block", "training__recompute_passes": 2},
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", ACTIVATIONS, ids=lambda o: "-".join(map(str, o.values())) or "adaptive")
def test_activations_are_what_stays_alive(overrides, precision):
    config = config_for(**overrides, training__precision=precision)
    left, _ = forward_and_backward(config, Mesh())
    rank = Rank(config)
    softmax = BATCH * LENGTH * VOCABULARY * 4  # of the loss, in place of the logits
    expected = sum(pass_bytes(rank, p) for p in passes(rank)) + softmax
    # Not counted are the router's numbers, a few for each token, and the clones of norms' weights in recipes.
    assert 0.95 * left < expected <= 1.01 * left


@pytest.mark.parametrize("chunks", [2, 8])
def test_the_loss_needs_a_chunk_of_logits_and_the_gradients_that_chunks_add_to(chunks, monkeypatch):
    config = config_for(ponder__mode="vanilla", model__hidden_size=32)
    rank = Rank(config)
    whole = loss_bytes(rank)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", whole // chunks)
    head, labels = Head(config.model, rank.tensor, 1).to(rank.dtype), random_tokens(BATCH, LENGTH, VOCABULARY)
    torch.nn.init.normal_(head.weight)
    x = torch.randn(BATCH, LENGTH, config.model.hidden_size, dtype=rank.dtype, requires_grad=True)
    with Alive() as alive:
        head(x, labels)[0].backward()
    given = 4 * (head.weight.numel() + x.numel())  # of which operations inside make views
    assert 0.95 * (alive.most - given) < loss_bytes(rank) <= 1.05 * (alive.most - given)
    assert loss_bytes(rank) < whole + given


def measure_tensor_ranks(mesh: Mesh, cases: list[dict]) -> list[int]:
    return [forward_and_backward(config_for(**case), mesh)[0] for case in cases]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_of_tensor_ranks(sequence_parallel):
    layout = {"parallel__tensor": 2, "parallel__sequence_parallel": str(sequence_parallel).lower()}
    cases = [
        layout | case
        for case in ({}, {"ponder__mode": "fixed"}, {"ponder__mode": "ponderlm"}, {"training__recompute": "attention"})
    ]
    cases.append(layout | {"model__family": "gpt_neox", "training__precision": "bf16"})
    cases.append(layout | {"ponder__latent_visibility": "own"})
    measured = run_distributed(measure_tensor_ranks, 2, cases, tensor=2, sequence_parallel=sequence_parallel)
    for case, *left in zip(cases, *measured, strict=True):
        rank = Rank(config_for(**case))
        expected = sum(pass_bytes(rank, p) for p in passes(rank)) + loss_bytes(rank) * (
            1 if rank.config.training.precision == "fp32" else 4 / 6
        )
        for size in left:
            assert 0.95 * size < expected <= 1.01 * size, case


def measure_context_ranks(mesh: Mesh, cases: list[dict]) -> list[tuple[int, int]]:
    return [forward_and_backward(config_for(**case), mesh) for case in cases]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_activations_of_context_ranks(ranks):
    cases = [{}, {"model__num_kv_heads": 1}, {"training__recompute": "attention"}]
    cases += [{"ponder__latent_visibility": "own"}]
    if ranks > 2:
        cases += [{"training__recompute": "block"}, {"data__reset_at_eod": "true"}, {"ponder__mode": "ponderlm"}]
        cases += [{"ponder__mode": "fixed"}, {"model__family": "gpt_neox", "training__precision": "bf16"}]
    cases = [{"parallel__context": ranks} | case for case in cases]
    measured = run_distributed(measure_context_ranks, ranks, cases, context=ranks)
    for case, *of_ranks in zip(cases, *measured, strict=True):
        rank = Rank(config_for(**case))
        expected = sum(pass_bytes(rank, p) for p in passes(rank))
        expected += loss_bytes(rank) * (1 if rank.config.training.precision == "fp32" else 4 / 6)
        for left, most in of_ranks:
            assert 0.95 * left < expected <= 1.01 * left, case
            assert max(map(sum, running_moments(rank))) - held_gradient_bytes(rank) == pytest.approx(most, rel=0.15)


def test_activations_fall_with_context_ranks():
    sizes = []
    for ranks in (1, 2, 4):
        rank = Rank(config_for(parallel__context=ranks, training__attention_kernel="value_side"))
        sizes.append(ranks * sum(pass_bytes(rank, p) for p in passes(rank)))
    assert sizes[1] == sizes[2]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("mode", ["vanilla", "adaptive"])
@pytest.mark.parametrize(("pipeline", "count"), [(2, 1), (2, 2), (2, 6), (3, 2), (3, 6), (3, 8), (4, 8)])
def test_what_is_in_flight_is_what_the_schedule_runs(pipeline, count, mode, schedule):
    config = config_for(
        ponder__mode=mode,
        model__num_layers=pipeline,
        parallel__pipeline=pipeline,
        parallel__pipeline_schedule=schedule,
        training__global_batch_size=BATCH * count,
    )
    kind = ScheduleInterleaved1F1B if schedule == "1f1b" else ScheduleInterleavedZeroBubble
    sizes = [float(2**index) for index in range(len(Rank(config).plan))]
    stages = stages_on_paper(pipeline, len(sizes))
    order = kind(stages, count, loss_fn=torch.sum).pipeline_order
    frees = "FULL_BACKWARD" if schedule == "1f1b" else "BACKWARD_WEIGHT"
    for place in range(pipeline):
        now = most = 0.0
        for action in filter(None, order[place]):
            size = sizes[action.stage_index // pipeline]
            now += size * ((action.computation_type.name == "FORWARD") - (action.computation_type.name == frees))
            most = max(most, now)
        assert now == 0
        assert most_in_flight(Rank(config, pipeline_rank=place), sizes) == most


# Peaks


PEAKS = {
    "none": {},
    "eod": {"data__reset_at_eod": "true"},
    "block": {"training__recompute": "block"},
    "attention": {"training__recompute": "attention"},
    "pause": {"ponder__mode": "pause"},
    "loop": {"ponder__mode": "loop"},
    "ponderlm": {"ponder__mode": "ponderlm"},
    "own": {"ponder__latent_visibility": "own"},
    "own, block": {"ponder__latent_visibility": "own", "training__recompute": "block"},
}


@pytest.mark.parametrize("overrides", PEAKS.values(), ids=PEAKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_micro_batch(overrides, precision):
    config = config_for(**overrides, training__precision=precision)
    _, most = forward_and_backward(config, Mesh())
    held = held_gradient_bytes(Rank(config))  # by DeepSpeed, which is not there
    assert max(map(sum, running_moments(Rank(config)))) - held == pytest.approx(most, rel=0.12)


@pytest.mark.parametrize("stage", [0, 1])
def test_muon_remembers_one_number_of_each_of_a_matrix(stage):
    config = config_for(optimizer__name="muon", parallel__zero_stage=stage)
    rank = Rank(config, data=2)
    matrices = 3 * (4 * 128 * 128 + 3 * 128 * 352)
    others = rank.part.count - matrices
    expected = 4 * matrices + 8 * others if stage == 0 else (8 * matrices + 12 * others) / 2
    assert optimizer_bytes(rank) == expected
    assert update_bytes(rank) == 4 * ((4 + 2 * stage) * 128 * 352 + 2 * 128**2)
    assert update_bytes(Rank(config_for())) == 0


def measure_engines(mesh: Mesh, cases: list[dict]) -> list[int]:
    return [measure_engine(mesh, config_for(**case)) for case in cases]


def measure_engine(mesh: Mesh, config: Config) -> int:
    """The most that is alive during the second step of real training."""
    own = config.training.global_batch_size // mesh.data.size
    with Alive(Rank(config, mesh.data.size, mesh.pipeline.rank).part.count) as alive:
        model = build_part(config, mesh)
        initialize(model, seed=0)
        engine = Engine(Objective(model), config, mesh)
        for step in range(2):
            gc.collect()
            alive.most = alive.now
            tokens = random_tokens(own, LENGTH + 1, VOCABULARY, seed=step).split(BATCH)
            engine.forward_backward(tokens, R, engine.rule("soft"), 0.1, 1e-3)
            engine.step(1e-3)
    return alive.most


STAGES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def check_engines(cases: list[dict], data: int, pipeline: int) -> None:
    """Compare with what really is alive on 2 ranks, and report all that is wrong."""
    measured = run_distributed(measure_engines, 2, cases, pipeline=pipeline, time_limit=550)
    wrong = []
    for place, peaks in enumerate(measured):
        for case, most in zip(cases, peaks, strict=True):
            rank = Rank(config_for(**case), data, pipeline_rank=place if pipeline > 1 else 0)
            ratio = memory_estimate(rank).total / most
            wrong += [(place, case, ratio)] if abs(ratio - 1) > 0.1 else []
    assert not wrong


@pytest.mark.slow
def test_the_peak_of_training_at_every_stage():
    cases = [
        {
            "parallel__zero_stage": stage,
            "training__precision": precision,
            "training__recompute": recompute,
            "training__global_batch_size": 2 * BATCH * accumulation,
        }
        for precision, stage in STAGES
        for accumulation, recompute in ((2, "none"), (1, "block"))
    ]
    check_engines(cases, data=2, pipeline=1)


@pytest.mark.slow
def test_the_peak_of_training_in_a_pipeline():
    layout = {"parallel__pipeline": 2, "model__num_layers": 4, "training__global_batch_size": 4 * BATCH}
    cases = [
        {},
        {"ponder__mode": "fixed", "training__precision": "bf16"},
        {"training__recompute": "block", "parallel__zero_stage": 0},
        {"parallel__pipeline_schedule": "zero_bubble"},
        {"ponder__mode": "loop"},
        {"ponder__mode": "ponderlm"},
    ]
    check_engines([layout | case for case in cases], data=1, pipeline=2)


# The table
