"""Muon takes the matrices of blocks, in every layout as one process of PyTorch does, and leaves the rest to AdamW."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.reader import open_tensors, read_config_of
from megatron_ponder.config import Config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.muon import orthogonalised
from megatron_ponder.training.optimizer import build_optimizer
from megatron_ponder.training.pieces import partitioned_pieces
from tests.distributed import run_distributed
from tests.finished_runs import refused, tiny_arguments, train_in_turn
from tests.models import small_config, small_model
from tests.training.layouts import RATE, STEPS, optimizers_of_pytorch

MUON = {"optimizer__name": "muon", "optimizer__weight_decay": 0.2}


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]


def stepped_by_pytorch(config: Config) -> nn.Module:
    model = small_model(model__num_kv_heads=2).float()
    optimizers = optimizers_of_pytorch(dict(model.named_parameters()), config)
    for step in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return model


def flattened(tensors: list[Tensor], padding: int) -> Tensor:
    return torch.cat([*(tensor.flatten() for tensor in tensors), torch.zeros(padding)])


def stepped(config: Config, partitioned: bool) -> nn.Module:
    """By ours; `partitioned` puts one flat tensor in the place of each group, as ZeRO does."""
    model = small_model(model__num_kv_heads=2).float()
    optimizer = build_optimizer(model, config, Mesh())
    groups = [list(group["params"]) for group in optimizer.param_groups]
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        if partitioned:
            group["params"] = [nn.Parameter(flattened([p.detach() for p in parameters], padding=3))]
    for step in range(STEPS):
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = RATE * group.get("rate_factor", 1.0)
            if partitioned:
                group["params"][0].grad = flattened([p.grad for p in parameters], padding=3)
        optimizer.step()
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        if partitioned:
            parts = group["params"][0].detach()[:-3].split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data.copy_(part.view(parameter.shape))
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer__muon_learning_rate": 0.02},
        {
            "optimizer__muon_scaling": "original",
            "optimizer__muon_learning_rate": 0.02,
            "optimizer__muon_momentum": 0.8,
        },
    ],
    ids=["usual", "original"],
)
def test_in_bf16_it_is_that_of_pytorch_bit_for_bit(overrides):
    config = small_config(**MUON, **overrides, training__precision="bf16")
    expected = dict(stepped_by_pytorch(config).named_parameters())
    for name, parameter in stepped(config, partitioned=True).named_parameters():
        if name.startswith("transformer.blocks.") and parameter.dim() == 2:
            assert torch.equal(parameter, expected[name]), name
        else:
            assert torch.allclose(parameter, expected[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("stage", [0, 1])
def test_in_fp32_it_is_what_pytorch_would_compute_in_fp64(stage):
    config = small_config(**MUON, training__precision="fp32", parallel__zero_stage=stage)
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):
        expected = dict(stepped_by_pytorch(config).named_parameters())
    for name, parameter in stepped(config, partitioned=stage > 0).named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=0, atol=2e-6), name


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32)])
def test_singular_values_become_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalised(matrix.to(dtype)).float())
        assert 0.6 < values.min() <= values.max() < 1.3
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def test_each_number_of_every_matrix_belongs_to_one_data_rank():
    specs = [spec for _, _, spec, _ in declarations(small_model()) if spec.matrix]
    whole = sum(spec.shape[0] * spec.shape[1] for spec in specs)
    for ranks in (1, 2, 3, 7, 40):
        size = -(-whole // (2 * ranks)) * 2
        seen = torch.zeros(len(specs), max(spec.shape[0] * spec.shape[1] for spec in specs))
        places = torch.zeros(ranks * size)
        for rank in range(ranks):
            for piece in partitioned_pieces(torch.empty(size), specs, Axis(), Axis(ranks, rank)):
                index = next(index for index, spec in enumerate(specs) if spec is piece.spec)
                seen[index, piece.shares[rank]] += 1
                places[rank * size + piece.place.start : rank * size + piece.place.stop] += 1
        assert places[:whole].eq(1).all()
        assert seen.sum() == whole
        assert seen.max() == 1


def tensors_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All of a checkpoint."""
    with open_tensors(run_dir / "checkpoints" / f"step-{step:08d}") as tensors:
        return {key: tensors.get(*key.split("/")) for key in tensors.manifest.tensors}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """Two steps by either optimiser, and the second one of Muon's once more, from the checkpoint between them."""
    folder = tmp_path_factory.mktemp("runs")
    steps = {
        "training__steps": 2,
        "training__eval_interval": 0,
        "checkpoint__interval": 1,
        "optimizer__weight_decay": 0,
    }
    commands = [
        tiny_arguments(corpus, folder / name, optimizer__name=name, optimizer__warmup_fraction=0, **steps)
        for name in ("adamw", "muon")
    ]
    resumed = {"checkpoint__resume": folder / "muon" / "checkpoints" / "step-00000001", **steps}
    commands.append(
        tiny_arguments(corpus, folder / "resumed", optimizer__name="muon", optimizer__warmup_fraction=0, **resumed)
    )
    run_distributed(train_in_turn, 1, commands, time_limit=300)
    return folder


def test_a_run_moves_matrices_by_muon_and_everything_else_by_adamw(runs):
    """Updates whose singular values are about equal, as AdamW's are not: what is named need not be on."""
    first, second = ({name: tensors_of(runs / name, step) for name in ("adamw", "muon")} for step in (1, 2))
    matrices = [name for name in first["muon"] if name.startswith("momentum_buffer/")]
    assert len(matrices) == 2 * 7
    shares: dict[str, list[float]] = {"adamw": [], "muon": []}  # 1 where all singular values are the largest
    for optimizer, found in shares.items():
        for name in matrices:
            name = name.replace("momentum_buffer", "weight")
            values = torch.linalg.svdvals(second[optimizer][name] - first[optimizer][name])
            found.append(float(values.square().mean() / values.max().square()))
    assert max(shares["adamw"]) < 0.45 < 0.5 < min(shares["muon"]), shares
    said = "; Muon moves 14 matrices of this rank's blocks, AdamW everything else\n"
    assert said in (runs / "muon" / "train.log").read_text()
    assert "Muon" not in (runs / "adamw" / "train.log").read_text()
    config = read_config_of(runs / "muon" / "checkpoints" / "step-00000001")
    for name, _, spec, _ in declarations(PonderLM(config.model, config.ponder)):
        same = torch.equal(first["muon"][f"weight/{name}"], first["adamw"][f"weight/{name}"])
        assert same is not spec.matrix, name


def test_a_run_that_is_resumed_is_the_run_that_went_on(runs):
    whole, resumed = tensors_of(runs / "muon", 2), tensors_of(runs / "resumed", 2)
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key


def test_the_other_optimiser_does_not_go_on(runs, corpus):
    source = runs / "muon" / "checkpoints" / "step-00000001"
    said = refused(tiny_arguments(corpus, runs / "other", training__steps=2, checkpoint__resume=source))
    assert said.startswith(
        f"{source} was trained with optimizer.name muon, and adamw cannot go on with what that remem"
    )
    assert said.endswith("set it to muon, or start a new run from its weights by --checkpoint.initialize_from")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"optimizer__name": "muon", "parallel__zero_stage": 3},
            "set parallel.zero_stage to 1 or 2, or optimizer.name to",
        ),
        (
            {"optimizer__muon_momentum": 0.9},
            "optimizer.muon_momentum 0.9 has no meaning with optimizer.name adamw; leave",
        ),
        (
            {"optimizer__muon_scaling": "original", "optimizer__name": "muon"},
            "set optimizer.muon_learning_rate, for exam",
        ),
    ],
)
def test_what_contradicts_it_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        small_config(**overrides)
