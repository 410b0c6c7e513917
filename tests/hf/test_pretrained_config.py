"""What a foreign config.json says: every field is understood, known to be harmless, or refused by name."""

import json
import math

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import read_config
from megatron_ponder.hf.configuration_ponderlm import PonderLMConfig
from megatron_ponder.hf.export import export_config
from megatron_ponder.hf.fields import LARGEST
from megatron_ponder.hf.pretrained_config import AUTO_MAP, settings
from tests.models import small_config

# What transformers 4.30 to 4.57 wrote into every file beside the fields of today, with their defaults.
EARLIER: dict = {
    **dict.fromkeys(["bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "torch_dtype", "prefix"]),
    **dict.fromkeys(["decoder_start_token_id", "exponential_decay_length_penalty", "finetuning_task", "sep_token_id"]),
    **dict.fromkeys(["forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "task_specific_params"]),
    **dict.fromkeys(["add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"], False),
    **dict.fromkeys(["do_sample", "early_stopping", "output_scores", "remove_invalid_values", "torchscript"], False),
    **dict.fromkeys(["return_dict_in_generate", "tf_legacy_loss", "use_bfloat16"], False),
    **dict.fromkeys(["diversity_penalty", "encoder_no_repeat_ngram_size", "min_length", "no_repeat_ngram_size"], 0),
    **dict.fromkeys(["length_penalty", "repetition_penalty", "temperature", "top_p", "typical_p"], 1.0),
    **dict.fromkeys(["num_beam_groups", "num_beams", "num_return_sequences"], 1),
    **{"max_length": 20, "top_k": 50, "pruned_heads": {}, "tokenizer_class": "GPTNeoXTokenizer"},
}
PONDERLM_2 = {
    "recurrent_model": True,
    "scale_embeds": True,
    "num_latent_thoughts": 3,
    "interpolation": False,
    "num_jacobi_iterations": 4,
    "random_jacobi_iterations": True,
    "interpolation_use_topk": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_gpt_neox.GPTNeoXForCausalLM"},
}


def written(config: PreTrainedConfig, **changes) -> dict:
    """All of a configuration as a file would hold it, the fields that have their defaults included."""
    return json.loads(json.dumps(config.to_dict(), default=str)) | changes


def exported(**changes) -> dict:
    return written(export_config(small_config(), None), auto_map=AUTO_MAP, **changes)


@pytest.mark.parametrize(
    "theirs",
    [
        written(LlamaConfig(), architectures=["LlamaForCausalLM"]),
        written(GPTNeoXConfig(), architectures=["GPTNeoXForCausalLM"]),
        written(LlamaConfig(), **EARLIER, rope_theta=10000.0, rope_scaling=None, rope_parameters=None),
        written(GPTNeoXConfig(), **EARLIER, rotary_pct=0.25, rotary_emb_base=10000, rope_theta=1e4, rope_scaling=None),
        exported(architectures=["PonderLMForCausalLM"]),
    ],
)
def test_whatever_transformers_writes_is_known(theirs):
    config = read_config(settings(theirs))
    assert config.model.hidden_size == theirs["hidden_size"]
    assert config.model.family == theirs.get("base_family", theirs["model_type"])
    with pytest.raises(UserError, match=r"^logit_softcap 30.0 in config.json is not known here, and may change what"):
        settings(theirs | {"logit_softcap": 30.0})
    assert settings(theirs | {"logit_softcap": None}) == settings(theirs)


@pytest.mark.parametrize("kind", [LlamaConfig, GPTNeoXConfig])
def test_ponderlm_2(kind):
    """Released checkpoints look like plain models; the mode, K, R and the scale are those of their training."""
    theirs = written(kind(hidden_size=1024, num_attention_heads=16), **PONDERLM_2)
    config = read_config(settings(theirs))
    ponder = config.ponder
    assert (ponder.mode, ponder.latent_steps, config.ponder_training.refinement_choices) == ("fixed", 3, (4,))
    assert ponder.embedding_scale == math.sqrt(2.5 * 1024)
    assert read_config(settings(theirs | {"scale_embeds": False})).ponder.embedding_scale == 1
    without = read_config(settings(theirs | {"num_latent_thoughts": 0})).ponder
    assert (without.mode, without.embedding_scale) == ("vanilla", math.sqrt(2.5 * 1024))
    plain = settings(theirs | {"recurrent_model": False, "auto_map": None})
    assert read_config(plain).ponder.embedding_scale == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpolation": True}, "interpolation True in config.json is something PonderLM does not have"),
        ({"interpolation": None}, "config.json lacks interpolation"),
        ({"num_latent_thoughts": None}, "config.json lacks num_latent_thoughts"),
        ({"num_jacobi_iterations": [2, 3]}, "num_jacobi_iterations in config.json is [2, 3], which is not a whole"),
        ({"scale_embeds": "true"}, "scale_embeds in config.json is true, which is not true or false"),
        ({"use_all_logits": True}, "use_all_logits True"),
        ({"recurrent_model": "yes"}, "recurrent_model in config.json is yes"),
        ({"recurrent_model": False}, "auto_map {'AutoModelForCausalLM': 'modeling_gpt_neox"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_llama_loop.LlamaForCausalLM"}}, "is that of loop"),
        ({"auto_map": {"AutoModel": "modeling_gpt_neox_addhidden_weightshare.X"}}, "is that of addhidden"),
        ({"ponder_gate": 2}, "ponder_gate 2 in config.json is not known here"),
    ],
)
def test_what_is_no_ponderlm_2_is_refused(changes, message):
    theirs = written(GPTNeoXConfig(), **PONDERLM_2) | changes
    with pytest.raises(UserError) as caught:
        settings(theirs)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}, "auto_map {'AutoModelForCausalLM': 'theirs.Model'}"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceClassification']"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads {'0': [1]}"),
        ({"attention_dropout": 0.1}, "attention_dropout in config.json is not 0"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"rope_interleaved": True}, "rope_interleaved True"),
        ({"rope_parameters": {"factor": 2.0}}, "factor 2.0 in rope_parameters in config.json is not known here"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters in config.json lacks factor"),
        (
            {"rope_scaling": ["linear"], "rope_parameters": None},
            "rope_scaling in config.json is ['linear'], which is not an object",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"model_type": ["llama"]}, "model_type ['llama'] in config.json cannot be converted; give an export of"),
        ({"model_type": None}, "model_type None in config.json cannot be converted"),
        ({"mup_scale": "x" * 500}, f"mup_scale {'x' * 57}... in config.json"),
    ],
)
def test_what_a_plain_model_must_not_have(changes, message):
    with pytest.raises(UserError) as caught:
        settings(written(LlamaConfig()) | changes)
    assert message in str(caught.value)


def test_an_export_with_code_that_is_not_ours_is_refused():
    repository = {"AutoModelForCausalLM": f"someone/model--{AUTO_MAP['AutoModelForCausalLM']}"}
    assert settings(exported() | {"auto_map": repository}) == settings(exported())
    for auto_map in ({"AutoModelForCausalLM": "other.Model"}, {"AutoModel": "modeling_ponderlm.PonderLMForCausalLM"}):
        with pytest.raises(UserError, match=r"in auto_map in config\.json"):
            settings(exported() | {"auto_map": auto_map})


# What exports said of features when the family said the others; the rest is as it is today.
FORMER = {
    "llama": {"hidden_act": "silu", "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 500.0},
    "gpt_neox": {
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-4, "rotary_emb_base": 500.0, "rotary_pct": 0.5},
        "use_parallel_residual": False,
    },
}


@pytest.mark.parametrize("family", FORMER)
def test_exports_that_do_not_say_every_feature(family):
    today = exported()
    names = {"norm", "gated_ffn", "biases", *FORMER["llama"], "rotary_pct", "use_parallel_residual"}
    names |= {"qk_norm", "head_dim", "rope_scaling_type"}
    theirs = {name: today[name] for name in today.keys() - names} | {"base_family": family} | FORMER[family]
    model = read_config(settings(theirs)).model
    usual = read_config([f"--model.family={family}"]).model
    for name in ("norm", "gated_ffn", "activation", "biases"):
        assert getattr(model, name) == getattr(usual, name)
    said = (model.num_kv_heads, model.norm_epsilon, model.rotary_fraction, model.residual)
    assert said == ((2, 1e-6, 1.0, "sequential") if family == "llama" else (4, 1e-4, 0.5, "sequential"))
    assert (model.family, model.rope_theta) == (family, 500.0)
    with pytest.raises(ValueError, match="older versions lack: load those with the files that came with them"):
        PonderLMConfig(**theirs)
    with pytest.raises(UserError, match=r"^gated_ffn True in config\.json is not known here"):
        settings(theirs | {"gated_ffn": True})


FIELDS = [
    *((written(LlamaConfig(num_key_value_heads=8)), name) for name in ("vocab_size", "num_key_value_heads")),
    *((written(LlamaConfig()), name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")),
    *((written(LlamaConfig()), name) for name in ("num_attention_heads", "max_position_embeddings", "rms_norm_eps")),
    *((written(LlamaConfig()), name) for name in ("initializer_range", "tie_word_embeddings", "rope_parameters")),
    *((written(GPTNeoXConfig()), name) for name in ("layer_norm_eps", "use_parallel_residual", "attention_dropout")),
    *((written(GPTNeoXConfig(), rotary_pct=0.5, rotary_emb_base=100), name) for name in ("rotary_pct",)),
    *((exported(), name) for name in ("embedding_scale", "ponder_mode", "ponder_max_steps", "ponder_threshold")),
    *((exported(), name) for name in ("norm", "gated_ffn", "biases", "hidden_act", "rotary_pct", "rms_norm_eps")),
    *((exported(), name) for name in ("ponder_router_bias", "ponder_router_hidden_size", "base_family", "rope_theta")),
]


@pytest.mark.parametrize(("theirs", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_values_of_wrong_types_are_refused_by_name(theirs, name):
    wrong = [[1], "yes", float("nan"), float("inf"), {"a": 1}, 10**400]
    wrong += [1] if isinstance(theirs[name], bool) else [True]
    wrong += [-1, 0.5, LARGEST + 1] if type(theirs[name]) is int else []
    for value in wrong:
        with pytest.raises(UserError) as caught:
            read_config(settings(theirs | {name: value}))
        assert name in str(caught.value) or (
            name == "rope_parameters" and "a 1 in rope_parameters" in str(caught.value)
        )
        assert len(str(caught.value)) < 400
