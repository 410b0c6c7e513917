import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import import_pretrained, tokenizer_of
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import initialize
from tests.hf.exported import weights_of
from tests.hf.plain_names import to_gpt_neox, to_llama
from tests.hf.test_pretrained_config import PONDERLM_2
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
    return with_biases(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES | options)))


def with_biases(model):
    """The model, with random biases."""
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
        lambda: with_biases(llama(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
        lambda: gpt_neox(use_parallel_residual=True),
        lambda: gpt_neox(use_parallel_residual=True, hidden_act="silu"),
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
    got = ours.head(ours.jacobi(tokens, 0, ours.rule("hard")).output_BLH)
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


def test_a_tied_model_may_get_a_head_of_its_own(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tied, _ = import_pretrained(tmp_path, VANILLA)
    weights, config = import_pretrained(tmp_path, [*VANILLA, "--model.tie_embeddings", "false"])
    assert weights.keys() - tied.keys() == {"head.weight"}
    assert torch.equal(weights["head.weight"], weights["embedding.weight"])
    ours = built(weights, config)
    assert ours.head.weight is not ours.embedding.weight
    with pytest.raises(UserError, match=r"is a Hugging Face model and no checkpoint; make one of it with ponder"):
        resolve_checkpoint(tmp_path)


def test_a_plain_model_gets_a_fresh_router(tmp_path):
    llama().save_pretrained(tmp_path)
    weights, config = import_pretrained(tmp_path, ["--ponder.latent_steps", "4", "--ponder.router_hidden_size", "8"])
    assert (config.ponder.mode, config.ponder.latent_steps, config.ponder.embedding_scale) == ("adaptive", 4, 1.0)
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
        {"inference__threshold": 0.3, "inference__router_bias": -0.25, "ponder__router_hidden_size": 8},
        {"ponder__mode": "fixed", "model__tie_embeddings": "true"},
        {"ponder__mode": "pause"},
        {"ponder__mode": "vanilla", "model__norm_epsilon": 1e-6, "model__rope_theta": 123456.789},
    ],
)
def test_there_and_back(tmp_path, family, option):
    options = {"model__family": family, "ponder_training__jacobi_iterations": 3} | option
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
    more, _ = import_pretrained(tmp_path / "exported", ["--ponder.latent_steps", "3"])
    assert more["router.output.bias"].tolist() == [0, 0, 0, 2]
    paused, config = import_pretrained(tmp_path / "exported", ["--ponder.mode", "pause"])
    fresh = PonderLM(config.model, config.ponder)
    initialize(fresh, config.training.seed)
    assert torch.equal(paused["pauses.weight"], fresh.pauses.weight)
    assert tokenizer_of(tmp_path / "exported", config) == tmp_path / "exported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type gemma2 in config.json cannot be converted"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"head_dim": 16}, "q_proj.weight has shape (32, 32), but the configuration says (64, 32)"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type longrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "type su in rope_scaling"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"intermediate_size": 61}, "but the configuration says"),
        ({"num_hidden_layers": 3}, "config.json says 3 layers, but the weights have 2"),
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
    GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_act relu"):
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


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_sizes_that_no_tensor_has_are_refused_before_they_are_allocated(tmp_path, name):
    for theirs, size in ((llama(), 10**9), (gpt_neox(), 4 * 10**6)):
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: size, "head_dim": None}))
        with pytest.raises(
            UserError, match=r"by config\.json, but no tensor|layers, but the weights have 2|its range is"
        ):
            import_pretrained(tmp_path)


def test_heads_that_the_weights_do_not_have(tmp_path):
    gpt_neox().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 160, "num_attention_heads": 20}))
    with pytest.raises(UserError, match=r"qkv_proj\.bias has shape \(96,\), which is not 3 parts of 20 heads"):
        import_pretrained(tmp_path)


def test_a_head_of_its_own_that_is_said_to_be_the_embedding(tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"has an output head of its own, but tie_word_embeddings in config\.json"):
        import_pretrained(tmp_path)


def test_an_export_that_lacks_a_part_of_itself(tmp_path):
    """Its router is not made anew without a word because its config.json has been changed."""
    export(weights_of(small_model()), small_config(), None, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ponder_max_steps": 3}))
    with pytest.raises(UserError, match=r"router\.output\.\w+ has shape \(3.* but the configuration says \(4"):
        import_pretrained(tmp_path)
    weights, _ = import_pretrained(tmp_path, ["--ponder.latent_steps", "4"])
    assert weights["router.output.bias"].tolist() == [0, 0, 0, 0, 2]


def test_values_that_are_not_finite_are_refused(tmp_path):
    theirs = llama()
    with torch.no_grad():
        theirs.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 0 NaN and 1 infinite"):
        import_pretrained(tmp_path)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, sentencepiece_model):
    assert tokenizer_of(tmp_path, small_config()) is None
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    assert tokenizer_of(tmp_path, small_config(model__vocab_size=1024)) == tmp_path
    with pytest.raises(UserError, match=r"tokenizer\.model has 1024 tokens, but the model 1023"):
        tokenizer_of(tmp_path, small_config(model__vocab_size=1023))
    for name, content in (("tokenizer.model", b"garbage"), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff" * 99)):
        (tmp_path / "tokenizer.model").unlink(missing_ok=True)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is not a (SentencePiece model|Hugging Face tokenizer)") as caught:
            tokenizer_of(tmp_path, small_config())
        assert "\n" not in str(caught.value)


def jacobi_of_ponderlm_2(theirs, tokens, steps: int, refinements: int, scale: float) -> torch.Tensor:
    """Logits of a PonderLM-2 checkpoint, computed with transformers' own model of the family.

    Slots of all tokens are interleaved; every latent reads the last hidden state of the slot before it in the pass
    before, all slots of a token have its position, and the last slot predicts.
    """
    embedded = theirs.get_input_embeddings()(tokens) * scale
    latents: list[torch.Tensor] = []
    for slots in [*range(1, steps + 1), *[steps + 1] * (refinements + 1)]:
        stacked = torch.stack([embedded, *latents[: slots - 1]], 2).flatten(1, 2)
        positions = torch.arange(tokens.shape[1]).repeat_interleave(slots).expand(len(tokens), -1)
        mask = torch.ones(stacked.shape[1], stacked.shape[1], dtype=torch.bool).tril()[None, None]
        hidden = theirs.base_model(
            inputs_embeds=stacked, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state.unflatten(1, (-1, slots))
        latents = [hidden[:, :, slot] for slot in range(slots)]
    return theirs.get_output_embeddings()(latents[-1])


@pytest.mark.parametrize("theirs", [llama, gpt_neox])
@torch.no_grad()
def test_a_ponderlm_2_checkpoint_computes_what_it_computed(tmp_path, theirs):
    theirs = theirs().eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PONDERLM_2))
    weights, config = import_pretrained(tmp_path)
    ours, tokens = built(weights, config), random_tokens(2, 10)
    got = ours.head(ours.jacobi(tokens, config.ponder_training.evaluation_refinements, ours.rule("hard")).output_BLH)
    expected = jacobi_of_ponderlm_2(theirs, tokens, 3, 4, math.sqrt(2.5 * 32))
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (got - jacobi_of_ponderlm_2(theirs, tokens, 3, 4, 1.0)).abs().max() > 0.1 * expected.abs().max()


def test_overrides_are_checked(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"did you mean ponder\.latent_steps"):
        import_pretrained(tmp_path, ["--ponder.latent_step", "2"])
    config = import_pretrained(tmp_path, ["--inference.threshold", "0.2", "--training.run_dir", "elsewhere"])[1]
    assert config.inference.threshold == 0.2
    assert config.training.run_dir == "elsewhere"
