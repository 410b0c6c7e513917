"""Implementations of attention, and compilation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ponder.hf.configuration_ponderlm import PonderLMConfig
from megatron_ponder.hf.layers_ponderlm import eager_attention
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from tests.hf.exported import hugging_face
from tests.models import random_tokens, small_model

FAMILIES = [{"model__family": "llama", "model__num_kv_heads": 2}, {"model__family": "gpt_neox"}]


def varied_model(**overrides):
    return small_model(router_scale=4.0, inference__threshold=0.3, **overrides)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["vanilla", "fixed", "adaptive"])
def test_eager_attention_gives_the_same(family, mode, monkeypatch):
    twin = hugging_face(varied_model(ponder__mode=mode, **family))
    tokens = random_tokens(3, 9)
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 6:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    assert twin.config._attn_implementation == "sdpa"
    logits, generated = [], []
    for implementation in ("sdpa", "eager"):
        twin.set_attn_implementation(implementation)
        if implementation == "eager":
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        logits.append(torch.cat([twin(tokens).logits, twin(tokens, attention_mask=mask).logits]))
        generated.append(twin.generate(tokens, **options))
    assert (logits[0] - logits[1]).abs().max() < 1e-10
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    for sdpa, eager in zip(generated[0].logits, generated[1].logits, strict=True):
        assert (sdpa - eager).abs().max() < 1e-10


def test_eager_attention_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 10, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    exact = eager_attention(q.double(), k.double(), v.double(), None, True, 0.25)
    got = eager_attention(q, k, v, None, True, 0.25)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() < 0.05


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_other_implementations_are_refused(implementation, tmp_path):
    twin = hugging_face(varied_model().float())
    twin.save_pretrained(tmp_path)
    AutoModelForCausalLM.register(PonderLMConfig, PonderLMForCausalLM, exist_ok=True)
    message = f"attn_implementation is {implementation}; PonderLM has eager, and sdpa, which runs PyTorch's own flash-"
    with pytest.raises(ValueError, match=message):
        PonderLMForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    with pytest.raises(ValueError, match=r"does not support"):
        twin.set_attn_implementation(implementation)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_after_the_text_needs_no_mask(side, monkeypatch):
    """So that batches as training makes them run by the kernel for plainly causal attention."""
    twin = hugging_face(varied_model())
    tokens, mask = random_tokens(2, 8), torch.ones(2, 8)
    mask[0, 5:] = 0
    if side == "left":
        tokens, mask = tokens.flip(1), mask.flip(1)
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **options):
        masks.append(options["attn_mask"])
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    padded = twin(tokens, attention_mask=mask).logits[0][mask[0].bool()]
    assert masks
    assert all((given is None) == (side == "right") for given in masks)
    assert (padded - twin(tokens[:1, mask[0].bool()]).logits[0]).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["vanilla", "adaptive"])
def test_compiled(mode):
    """Graphs break where the number of steps is looked at, and nothing else changes."""
    twin = hugging_face(varied_model(ponder__mode=mode, model__num_layers=1).float())
    tokens = random_tokens(2, 8)
    expected, generated = twin(tokens, labels=tokens), twin.generate(tokens[:1], max_new_tokens=3)
    compiled = torch.compile(twin, backend="aot_eager")
    got = compiled(tokens, labels=tokens)
    assert (got.logits - expected.logits).abs().max() < 1e-4
    got.loss.backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert torch.equal(compiled.generate(tokens[:1], max_new_tokens=3), generated)
