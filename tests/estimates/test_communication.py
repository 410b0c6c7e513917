"""What is communicated on paper; `tests/benchmarks/test_communication.py` compares it with real ranks."""

import pytest
import torch

from megatron_ponder.config import stage_layers
from megatron_ponder.estimates.communication import Formula
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import ModelPart
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import declarations
from tests.models import small_config


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 3), (4, 2)])
@pytest.mark.parametrize("router", [0, 24])
def test_parameters_are_those_of_the_model(family, tensor, pipeline, router):
    config = small_config(
        model__family=family,
        model__num_layers=5,
        ponder__router_hidden_size=router,
        parallel__tensor=tensor,
        parallel__pipeline=pipeline,
        parallel__vocab_multiple=8,
    )
    for place, layers in enumerate(stage_layers(config)):
        part = ModelPart(layers, first=place == 0, last=place == pipeline - 1)
        with torch.device("meta"):
            mesh = Mesh(tensor=Axis(tensor))
            model = PonderLM(config.model, config.ponder, mesh, part=part, vocab_multiple=8)
        real = [(parameter.dim(), parameter.numel()) for _, parameter, *_ in declarations(model)]
        sizes = Rank(config, pipeline_rank=place).part.parameters
        assert sorted((size.dims, size.count) for size in sizes) == sorted(real)


def terms(data: int = 1, place: int = 0, **overrides) -> dict[tuple[str, str], int]:
    """Bytes by axis and operation."""
    config = small_config(training__micro_batch_size=1, training__global_batch_size=4, **overrides)
    sums: dict[tuple[str, str], int] = {}
    for term in Formula(Rank(config, data, place), refinements=1).terms():
        sums[term.axis, term.operation] = sums.get((term.axis, term.operation), 0) + term.bytes
    return sums


def test_one_process_sends_nothing():
    assert terms() == {}


def test_half_the_width_sends_half_the_activations():
    vanilla = {"ponder__mode": "vanilla", "parallel__pipeline": 2}
    wide, narrow = (terms(**vanilla, training__precision=kind)["pipeline", "send"] for kind in ("fp32", "bf16"))
    assert narrow * 2 == wide
    # forward on the first rank: 4 micro-batches of 64 tokens of 32 numbers
    assert narrow == 4 * 64 * 32 * 2


def test_gradients_are_summed_in_fp32_and_weights_shared_as_they_are():
    sums = terms(data=2, training__precision="bf16", parallel__zero_stage=0)  # which runs as stage 1
    count = Rank(small_config()).part.count
    assert sums["data", "all-reduce"] == 4 * count + 8
    assert 2 * count <= sums["data", "all-gather"] <= 2 * count + 16
