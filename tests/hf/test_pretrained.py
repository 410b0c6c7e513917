import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.errors import UserError
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import import_pretrained, tokenizer_of
from megatron_ponder.hf.weights import to_gpt_neox, to_llama
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import initialize
from tests.hf.exported import weights_of
from tests.models import random_tokens, small_config, small_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
VANILLA = ["--ponder.mode", "vanilla"]


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options))


def gpt_neox(**options):
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def built(weights, config):
    model = PonderLM(config.model, config.ponder)
    load_weights(model, weights)
    return model


@pytest.mark.parametrize(
    "theirs",
    [
        lambda: llama(num_key_value_heads=2, rms_norm_eps=1e-6),
        lambda: llama(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        lambda: gpt_neox(use_parallel_residual=True),
        lambda: gpt_neox(use_parallel_residual=False, layer_norm_eps=1e-4),
        lambda: gpt_neox(rotary_emb_base=100.0, rotary_pct=0.5, tie_word_embeddings=True),
    ],
)
@torch.no_grad()
def test_a_plain_model_computes_what_it_computed(tmp_path, theirs):
    theirs = theirs().eval()
    theirs.save_pretrained(tmp_path)
    weights, config = import_pretrained(tmp_path, VANILLA)
    ours = built(weights, config)
    tokens = random_tokens(2, 20)
    expected = theirs(tokens).logits
    got = ours.head(ours.jacobi(tokens, 0, ours.pruning(hard=True)).output_BLH)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    renamed = to_llama(weights) if config.model.family == "llama" else to_gpt_neox(weights, 4)
    saved = load_file(tmp_path / "model.safetensors")
    assert renamed.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in renamed.items())


def test_configurations_of_older_versions(tmp_path):
    gpt_neox(rotary_emb_base=100.0, rotary_pct=0.5).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = import_pretrained(tmp_path, VANILLA)[1]
    written = json.loads(path.read_text())
    del written["rope_parameters"]
    path.write_text(json.dumps(written | {"rotary_pct": 0.5, "rotary_emb_base": 100, "rope_scaling": None}))
    assert import_pretrained(tmp_path, VANILLA)[1] == new
    assert (new.model.rotary_fraction, new.model.rope_theta) == (0.5, 100.0)

    llama().save_pretrained(tmp_path)
    written = json.loads(path.read_text())
    del written["rope_parameters"]
    path.write_text(json.dumps(written | {"rope_theta": 700.0}))
    assert import_pretrained(tmp_path)[1].model.rope_theta == 700.0


def test_a_tied_head_that_was_saved_all_the_same(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    weights, config = import_pretrained(tmp_path, VANILLA)
    assert config.model.tie_embeddings
    assert "head.weight" not in weights


def test_a_plain_model_gets_a_fresh_router(tmp_path):
    llama().save_pretrained(tmp_path)
    weights, config = import_pretrained(tmp_path, ["--ponder.max_steps", "4", "--ponder.router_hidden_size", "8"])
    assert (config.ponder.mode, config.ponder.max_steps, config.ponder.embedding_scale) == ("adaptive", 4, 1.0)
    fresh = PonderLM(config.model, config.ponder)
    initialize(fresh, config.training.seed)
    for name, tensor in fresh.named_parameters():
        assert torch.equal(weights[name], tensor) == (name.startswith("router.") or "norm" in name), name
    assert weights["router.output.bias"].tolist() == [0, 0, 0, 0, 2]
    assert import_pretrained(tmp_path, ["--ponder.embedding_scale", "2.5"])[1].ponder.embedding_scale == 2.5
    assert "router.output.bias" not in import_pretrained(tmp_path, ["--ponder.mode", "fixed"])[0]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "option",
    [
        {"ponder__threshold": 0.3, "ponder__router_bias": -0.25, "ponder__router_hidden_size": 8},
        {"ponder__mode": "fixed", "model__tie_embeddings": "true"},
        {"ponder__mode": "pause"},
        {"ponder__mode": "vanilla", "model__norm_epsilon": 1e-6, "model__rope_theta": 123456.789},
    ],
)
def test_there_and_back(tmp_path, family, option):
    options = {"model__family": family, "ponder__jacobi_iterations": 3} | option
    config, weights = small_config(**options), weights_of(small_model(**options))
    for number in range(2):
        export(weights, config, None, tmp_path / str(number))
        again, config_again = import_pretrained(tmp_path / str(number))
        assert again.keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())
        assert (config_again.model, config_again.ponder) == (config.model, config.ponder)
        weights, config = again, config_again


def test_an_export_in_another_mode(tmp_path, sentencepiece_model):
    options = {"model__vocab_size": 1024, "data__reset_at_eod": "true"}
    weights = weights_of(small_model(model__vocab_size=1024))
    export(weights, small_config(**options), sentencepiece_model, tmp_path / "exported", dtype="bfloat16")
    fixed, config = import_pretrained(tmp_path / "exported", ["--ponder.mode", "fixed"])
    assert config.data.reset_at_eod
    assert config.ponder.embedding_scale == small_config().ponder.embedding_scale
    assert set(weights) - set(fixed) == {"router.output.weight", "router.output.bias"}
    assert all(tensor.dtype == torch.float32 for tensor in fixed.values())
    assert torch.equal(fixed["head.weight"], weights["head.weight"].bfloat16().float())
    more, _ = import_pretrained(tmp_path / "exported", ["--ponder.max_steps", "3"])
    assert more["router.output.bias"].tolist() == [0, 0, 0, 2]
    paused, config = import_pretrained(tmp_path / "exported", ["--ponder.mode", "pause"])
    fresh = PonderLM(config.model, config.ponder)
    initialize(fresh, config.training.seed)
    assert torch.equal(paused["pauses.weight"], fresh.pauses.weight)
    assert tokenizer_of(tmp_path / "exported") == tmp_path / "exported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type mistral in config.json cannot be converted"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type linear"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"intermediate_size": 64}, "but the configuration says"),
        ({"num_hidden_layers": 3}, "differ in transformer.blocks.2"),
    ],
)
def test_what_ponderlm_does_not_have_is_refused(tmp_path, changes, message):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in written.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        import_pretrained(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_gpt_neox_models_are_refused(tmp_path):
    GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_act="gelu_new")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_act gelu_new"):
        import_pretrained(tmp_path)
    GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, attention_bias=False)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="attention_bias False"):
        import_pretrained(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    assert len(import_pretrained(tmp_path, VANILLA)[0]) == 21
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        import_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"names {shard.name}, which is not in"):
        import_pretrained(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        import_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="loads never execute pickled code"):
        import_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        import_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        import_pretrained(tmp_path / "nowhere")


def test_overrides_are_checked(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"did you mean ponder\.max_steps"):
        import_pretrained(tmp_path, ["--ponder.max_step", "2"])
    config = import_pretrained(tmp_path, ["--ponder.threshold", "0.2", "--training.run_dir", "elsewhere"])[1]
    assert config.ponder == replace(config.ponder, threshold=0.2)
    assert config.training.run_dir == "elsewhere"
