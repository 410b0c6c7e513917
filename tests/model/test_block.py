"""Blocks: the two residual wirings, and the feed-forward layers by their formulas."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.model.attention import Slots
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.norms import LayerNorm, RMSNorm, make_norm
from megatron_ponder.parallel.mesh import Axis
from tests.models import random_tokens, small_model


@pytest.mark.parametrize(
    ("family", "norm", "kind"), [("llama", None, RMSNorm), ("gpt_neox", None, LayerNorm), ("llama", "layer", LayerNorm)]
)
@pytest.mark.parametrize("residual", ["sequential", "parallel"])
def test_residual_stream(family, norm, kind, residual):
    given = {"model__norm": norm} if norm else {}
    model = small_model(model__family=family, model__residual=residual, ponder__mode="vanilla", **given)
    block = model.transformer.blocks["0"]
    tokens = random_tokens(2, 5)
    x = model.embed(tokens)
    angles = Geometry.of(tokens, None).angles(1, model.model_config, x.dtype)
    slots = Slots(5, angles)
    attended = block.attention(block.attention_norm(x), slots)
    mlp_input = x if residual == "parallel" else x + attended
    torch.testing.assert_close(block(x, slots), x + attended + block.mlp(block.mlp_norm(mlp_input), 5))
    assert isinstance(block.mlp_norm, kind)
    assert isinstance(make_norm(model.model_config, Axis()), kind)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_feed_forward(family):
    mlp = small_model(model__family=family).transformer.blocks["0"].mlp
    x = torch.randn(3, 32, dtype=torch.float64)
    up = x @ mlp.up_proj.weight.T
    if family == "llama":
        expected = (F.silu(x @ mlp.gate_proj.weight.T) * up) @ mlp.down_proj.weight.T
    else:
        up = up + mlp.up_proj.bias
        gelu = up * 0.5 * (1 + torch.erf(up / 2**0.5))
        expected = gelu @ mlp.down_proj.weight.T + mlp.down_proj.bias
    torch.testing.assert_close(mlp(x, 3), expected)
