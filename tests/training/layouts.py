"""A short training run on any layout of ranks and in one process of plain PyTorch, and their comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config
from megatron_ponder.config.batch_sizes import batch_size, samples_of
from megatron_ponder.estimates.rank import plan_of
from megatron_ponder.model.build import build_part
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import RuleKind
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations, initialize
from megatron_ponder.training.compiling import compile_blocks
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.penalty import Penalty
from megatron_ponder.training.replicas import differing_replicas
from megatron_ponder.training.schedules import training_rule
from megatron_ponder.training.state import gradients_of, state_of
from tests.distributed import run_distributed
from tests.models import LEARNED, MIXED, random_tokens, small_config

STEPS, REFINEMENTS, RATE = 3, (1, 2, 1), 1e-2
LENGTH = 11  # which neither two nor four tensor ranks can share evenly, nor the vocabulary of 61
EOD = 7
MODELS = {
    f"{family} {mode}": {"model__family": family, "ponder__mode": mode} | heads
    for family, heads in {"llama": {"model__num_kv_heads": 2}, "gpt_neox": {}}.items()
    for mode in ("vanilla", "fixed", "adaptive")
} | {
    "gpt_neox fixed": {"ponder__mode": "fixed", "model__family": "gpt_neox"} | LEARNED,
    "gpt_neox adaptive": {"model__family": "gpt_neox"} | LEARNED,
    "mixed features": MIXED,
    "llama pause": {"ponder__mode": "pause"},
    "llama sps": {"ponder__mode": "sps", "model__num_kv_heads": 2},
    "gpt_neox own": {"ponder__latent_visibility": "own", "model__family": "gpt_neox"} | LEARNED,
    "tied": {"model__tie_embeddings": True, "model__num_kv_heads": 2},
    "gpt_neox loop": {"ponder__mode": "loop", "model__family": "gpt_neox", "ponder__latent_scale": 0.3},
    # more tokens than a prediction is read through, and tensor ranks with unequal parts of them
    "llama ponderlm": {"ponder__mode": "ponderlm", "model__vocab_size": 301},
}


# Matrices of unlike shapes, biases beside them, and a learning rate that is not that of the others.
MUON = {"optimizer__name": "muon", "optimizer__muon_learning_rate": 6e-4}

# Number of samples, how a routing is applied, whether every step is measured by itself
Evaluation = tuple[int, RuleKind, bool]


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    context: int = 1

    @property
    def length(self) -> int:
        """Tokens of a sequence, which context ranks divide."""
        return LENGTH if self.context == 1 else 12

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step: two micro-batches a data rank, four in a pipeline."""
        return (8 if self.pipeline > 1 else 4) * self.data

    def config(self, case: dict) -> Config:
        """Of a run with the given overrides."""
        values = {
            "model__num_layers": self.pipeline + 1,  # some ranks have more blocks than others
            "model__init_std": 0.05,
            "ponder_training__penalty_weight": 0.05,
            "inference__threshold": 0.1,
            "data__sequence_length": self.length,
            "optimizer__gradient_clipping": 0.3,
            # Adam would make steps of full size of gradients that are 0 but for rounding, as key biases have
            "optimizer__epsilon": 1e-4,
            "training__global_batch_size": self.global_batch_size,
            "training__micro_batch_size": 2,
            "training__precision": "fp32",
            "parallel__tensor": self.tensor,
            "parallel__pipeline": self.pipeline,
            "parallel__context": self.context,
            "parallel__sequence_parallel": self.sequence_parallel,
            "parallel__zero_stage": self.zero_stage,
        }
        return small_config(**(values | case))

    def run(self, function: Callable, *args, time_limit: float = 500.0) -> list:
        """`function(mesh, self, *args)` on every rank."""
        return run_distributed(
            function,
            self.tensor * self.pipeline * self.context * self.data,
            self,
            *args,
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            sequence_parallel=self.sequence_parallel,
            time_limit=time_limit,
        )


@dataclass
class Step:
    """One optimiser step: sums over the whole batch, gradients before clipping by name, their norm."""

    tally: Tally
    gradients: dict[str, Tensor]
    norm: float


@dataclass
class Run:
    """What one rank, or one process alone, has seen of a training run; all tensors whole.

    Attributes:
        before: weights before training.
        steps: of the optimiser.
        after: weights after training.
        evaluations: before every step.
        differing: replicated parameters that differ between tensor ranks in the end.
    """

    before: dict[str, Tensor]
    steps: list[Step]
    after: dict[str, Tensor]
    evaluations: list[dict[Evaluation, Tally]]
    differing: list[str]


def train(mesh: Mesh, layout: Layout, case: dict, wanted: tuple[Evaluation, ...] = ()) -> Run:
    """Train on this rank.

    Args:
        mesh: the ranks.
        layout: theirs.
        case: overrides of the configuration.
        wanted: evaluations before every step.
    """
    config = layout.config(case)
    engine = Engine(Objective(model_for(config, mesh), packed=True), config, mesh)
    torch.compiler.reset()  # of the case before
    compile_blocks(engine.model, config, mesh.device, backend="aot_eager")
    rule, penalty = training_rule(0, config), Penalty(config, RunState())
    before, steps, evaluations = weights(engine), [], []
    for step in range(STEPS):
        evaluations.append({item: evaluate(engine, config, mesh, *item) for item in wanted})
        batch = batch_of(config, step)
        own, scale = torch.chunk(batch, mesh.data.size)[mesh.data.rank], 1 / (len(batch) * layout.length)
        own = own_share(own, mesh)
        micro_batches = own.split(config.training.micro_batch_size)
        sums = engine.forward_backward(micro_batches, REFINEMENTS[step], rule, penalty.weights(step), scale)
        gradients = gradients_of(engine)
        norm = engine.step(RATE)
        steps.append(Step(over_copies(sums, mesh), gradients, norm))
        penalty.observe(step, steps[-1].tally.mean_steps, steps[-1].tally.mean_shares)
    return Run(before, steps, weights(engine), evaluations, differing_replicas(engine))


def train_all(mesh: Mesh, layout: Layout, cases: dict[str, dict]) -> dict[str, Run]:
    """Every case in one start of the ranks, because importing DeepSpeed takes seconds."""
    return {name: train(mesh, layout, case) for name, case in cases.items()}


def evaluate(engine: Engine, config: Config, mesh: Mesh, count: int, kind: RuleKind, each_step: bool) -> Tally:
    """On the first samples of the validation batch, divided over the data-parallel ranks as training divides them."""
    size, rank = mesh.data.size, mesh.data.rank
    own = random_tokens(16, config.data.sequence_length + 1, seed=99)
    own = own_share(own[count * rank // size : count * (rank + 1) // size], mesh)
    per_batch = config.training.micro_batch_size
    micro_batches = own.split(per_batch) if len(own) else []
    rounds = ceil(ceil(count / size) / per_batch)
    return over_copies(engine.evaluate(micro_batches, rounds, 2, engine.rule(kind), each_step), mesh)


def over_copies(sums: Tensor, mesh: Mesh) -> Tally:
    if mesh.copies.size > 1:
        dist.all_reduce(sums, group=mesh.copies.group)
    return Tally.of(sums)


def own_share(tokens: Tensor, mesh: Mesh) -> Tensor:
    """(B, L + 1) → this context rank's share of the L tokens, and the one behind it."""
    length = (tokens.shape[1] - 1) // mesh.context.size
    return tokens[:, mesh.context.rank * length :][:, : length + 1]


def weights(engine: Engine) -> dict[str, Tensor]:
    return {item.name: item.tensor.clone() for item in state_of(engine) if item.kind == "weight"}


def model_for(config: Config, mesh: Mesh | None = None) -> PonderLM:
    """This rank's part of the initial model, whose router decides differently from token to token."""
    mesh = mesh or Mesh()
    model = build_part(config, mesh, EOD)
    initialize(model, seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter, *_ in declarations(model):
            if name.startswith("router"):
                scale = 3 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(config: Config, step: int) -> Tensor:
    """Tokens of all ranks in one step, int64 (global batch of the step, L + 1)."""
    training, length = config.training, config.data.sequence_length
    tokens = random_tokens(batch_size(training, samples_of(training, step)), length + 1, seed=step)
    return tokens.masked_fill(tokens % 5 == 0, EOD) if config.data.reset_at_eod else tokens


def alone(layout: Layout, case: dict, wanted: tuple[Evaluation, ...] = ()) -> Run:
    """The reference for a case: one process."""
    config = layout.config(case)
    # the other settings must not matter
    computes = ("model__", "ponder__", "ponder_training__", "data__", "optimizer__")
    items = {key: value for key, value in case.items() if key.startswith(computes)} | {
        "model__num_layers": config.model.num_layers,
        "training__global_batch_size": config.training.global_batch_size,
        "data__sequence_length": config.data.sequence_length,
        "training__batch_size_ramp": case.get("training__batch_size_ramp", "null"),
    }
    return _alone(tuple(items.items()), wanted)


@cache
def _alone(items: tuple[tuple], wanted: tuple[Evaluation, ...]) -> Run:
    """PyTorch alone, the whole batch at once; it must be able to tell right from wrong."""
    config = Layout().config(dict(items))
    objective = Objective(model_for(config))
    model, rule, penalty = objective.model, training_rule(0, config), Penalty(config, RunState())
    parameters = dict(model.named_parameters())
    optimizers = optimizers_of_pytorch(parameters, config)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    evaluated = random_tokens(16, config.data.sequence_length + 1, seed=99)
    steps, evaluations = [], []
    for step in range(STEPS):
        with torch.no_grad():
            evaluations.append(
                {
                    item: Tally.of(
                        objective(evaluated[: item[0]], 2, model.rule(item[1], bias=0.0), each_step=item[2])[1].sum(0)
                    )
                    for item in wanted
                }
            )
        tokens = batch_of(config, step)
        total, sums = objective(tokens, REFINEMENTS[step], rule, penalty.weights(step))
        (total / tokens[:, 1:].numel()).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        clipping = config.optimizer.gradient_clipping
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), clipping))
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):  # in which Muon iterates
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad()
        steps.append(Step(Tally.of(sums.sum(0)), gradients, norm))
        penalty.observe(step, steps[-1].tally.mean_steps, steps[-1].tally.mean_shares)
        assert norm > clipping, "nothing is clipped"
        assert all(gradient.norm() > 0 for gradient in gradients.values()), "a gradient is 0"
        assert model.router is None or sum(count > 0 for count in steps[-1].tally.steps) > 1, "all tokens decide alike"
    return Run(before, steps, {name: parameter.detach() for name, parameter in parameters.items()}, evaluations, [])


def optimizers_of_pytorch(parameters: dict[str, nn.Parameter], config: Config) -> list[torch.optim.Optimizer]:
    """PyTorch's own optimisers of a whole model, which know matrices of blocks by their names."""
    settings, rate, matrices = config.optimizer, RATE, {}
    if settings.name == "muon":
        rate *= (settings.muon_learning_rate or settings.learning_rate) / settings.learning_rate
        matrices = {
            name: p for name, p in parameters.items() if name.startswith("transformer.blocks.") and p.dim() == 2
        }
    others = {name: parameter for name, parameter in parameters.items() if name not in matrices}
    groups = [
        {
            "params": [parameter],
            "weight_decay": settings.weight_decay if parameter.dim() > 1 else 0.0,
            "lr": RATE * (settings.router_learning_rate_factor if name.startswith("router") else 1.0),
        }
        for name, parameter in others.items()
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon)]
    if matrices:
        usual = {"momentum": settings.muon_momentum, "adjust_lr_fn": settings.muon_scaling}
        made.append(torch.optim.Muon(matrices.values(), rate, settings.weight_decay, **usual))
    return made


def assert_equal_to_one_process(layout: Layout, case: dict, runs: list[Run]) -> None:
    """Losses, every gradient, their norms and all weights are those of one process, on every rank."""
    want = alone(layout, case)
    assert_whole_model_once(layout, [run.after for run in runs], want.after)
    for run in runs:
        assert run.differing == []
        for name, weight in run.before.items():
            assert torch.equal(weight, want.before[name]), name
        for expected, got in zip(want.steps, run.steps, strict=True):
            assert_same_tally(got.tally, expected.tally, 1e-5)
            assert got.norm == pytest.approx(expected.norm, rel=1e-5)
            assert got.gradients.keys() == run.after.keys()
            for name, gradient in got.gradients.items():
                error, size = (gradient - expected.gradients[name]).norm(), expected.gradients[name].norm()
                # A sum of thousands of gradients that cancel each other is known to their rounding.
                assert error < 1e-4 * size + 1e-7 * expected.norm, (name, error, size)
        for name, weight in run.after.items():
            assert (weight - want.after[name]).abs().max() < 1e-5, name


def saved_slots(layout: Layout, case: dict, run: Run) -> bool:
    """Whether every step has run fewer slots than its passes have; if not, all have run as many."""
    config, saved = layout.config(case), set()
    for got, refinements in zip(run.steps, REFINEMENTS, strict=True):
        whole = got.tally.tokens * sum(plan_of(config, refinements, training_rule(0, config).latents))
        assert got.tally.slots <= whole
        saved.add(got.tally.slots < whole)
    assert len(saved) == 1
    return saved.pop()


def assert_whole_model_once(layout: Layout, parts: list[dict], whole: dict) -> None:
    """Every pipeline rank has its part of the model, and everything is in exactly one of them."""
    stages = list(zip(*[iter(parts)] * (len(parts) // layout.pipeline), strict=True))
    for stage in stages:
        assert all(part.keys() == stage[0].keys() for part in stage)
    assert sorted(name for stage in stages for name in stage[0]) == sorted(whole)


def assert_same_tally(got: Tally, expected: Tally, tolerance: float) -> None:
    assert got.cross_entropy == pytest.approx(expected.cross_entropy, rel=tolerance)
    assert got.steps == expected.steps
    for name in ("penalty", "entropy", "weights", "own_losses", "first_squared", "steps_first"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=tolerance), name


def assert_near_one_process(layout: Layout, case: dict, runs: list[Run]) -> None:
    """What bf16 can promise: losses, norms and the fp32 master weights stay near those of fp32."""
    want = alone(layout, case)
    assert_whole_model_once(layout, [run.after for run in runs], want.after)
    for run in runs:
        assert run.differing == []
        for expected, got in zip(want.steps, run.steps, strict=True):
            assert got.tally.cross_entropy == pytest.approx(expected.tally.cross_entropy, rel=2e-2)
            assert got.norm == pytest.approx(expected.norm, rel=5e-2)
        for name, weight in run.after.items():
            assert weight.dtype == torch.float32
            assert (weight - want.after[name]).abs().mean() < 5e-3, name
        assert any((weight != weight.bfloat16()).any() for weight in run.after.values())
