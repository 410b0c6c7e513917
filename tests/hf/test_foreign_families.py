"""Models that transformers writes compute here what they compute there, on tensor ranks too, and go out and in."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.config import Config, read_config
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Request
from megatron_ponder.hf.export import export
from megatron_ponder.hf.pretrained import import_pretrained
from megatron_ponder.hf.pretrained_config import READERS, settings
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.replicated import replicated_parameters, sum_gradients
from megatron_ponder.parallel.sharding import declarations
from tests.distributed import run_distributed
from tests.hf.exported import hugging_face
from tests.hf.test_pretrained_config import written
from tests.models import random_tokens

SIZES = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED = {"num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS = {
    "llama 2": LlamaConfig(**SIZES),
    "llama 3": LlamaConfig(**SIZES, **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama 3.2": LlamaConfig(**SIZES, **GROUPED, rope_parameters=LLAMA3, head_dim=12, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, **GROUPED, head_dim=12, sliding_window=64),
    "qwen2": Qwen2Config(**SIZES, **GROUPED, tie_word_embeddings=True),
    "qwen2.5": Qwen2Config(**SIZES, **GROUPED, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, **GROUPED, head_dim=12, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SIZES, **GROUPED, no_rope_layers=[1, 1], pad_token_id=None),
    "gpt_neox": GPTNeoXConfig(**SIZES, rope_parameters=LINEAR, hidden_act="gelu_new"),
}
TOKENS = random_tokens(2, 24)  # longer than the original lengths above


@cache
def theirs(name: str) -> PreTrainedModel:
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@cache
def imported(name: str) -> tuple[dict[str, Tensor], Config]:
    with TemporaryDirectory() as folder:
        theirs(name).save_pretrained(folder)
        return import_pretrained(Path(folder), ["--ponder.mode", "vanilla"])


def built(config: Config, weights: dict[str, Tensor], mesh: Mesh | None = None) -> PonderLM:
    model = PonderLM(config.model, config.ponder, mesh)
    load_weights(model, weights)
    return model


def gradients(config: Config, weights: dict[str, Tensor], mesh: Mesh | None = None) -> tuple[float, dict[str, Tensor]]:
    """Loss of predicting every token from those before it, and this rank's parts of the gradients."""
    model = built(config, weights, mesh)
    hidden = model.jacobi(TOKENS[:, :-1], 0, model.rule("hard")).output_BLH
    loss, _ = model.head(hidden, TOKENS[:, 1:])
    loss.backward()
    shared = replicated_parameters(model)
    if shared:
        sum_gradients([parameter.grad for parameter in shared], mesh.tensor)
    return float(loss.detach()), {name: parameter.grad for name, parameter, *_ in declarations(model)}


@cache
def expected(name: str) -> tuple[float, dict[str, Tensor]]:
    """The same by transformers, under our names."""
    model = theirs(name)
    model.zero_grad()
    loss = F.cross_entropy(model(TOKENS[:, :-1]).logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    loss.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    return float(loss.detach()), READERS[model.config.model_type].weights(found, 4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name):
    weights, config = imported(name)
    ours = built(config, weights)
    with torch.no_grad():
        want = theirs(name)(TOKENS).logits
        got = ours.head(ours.jacobi(TOKENS, 0, ours.rule("hard")).output_BLH)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    loss, found = gradients(config, weights)
    assert_same_gradients(name, loss, found)


def assert_same_gradients(name: str, loss: float, found: dict[str, Tensor]) -> None:
    want_loss, want = expected(name)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert found.keys() == want.keys()
    for key, gradient in found.items():
        # those of key biases are 0 but for rounding
        scale = want[key.replace("k_proj.bias", "q_proj.bias")].norm()
        assert (gradient - want[key]).norm() < 1e-4 * scale, key


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text(name):
    weights, config = imported(name)
    ours, prompt = built(config, weights).eval(), TOKENS[:1, :5]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)  # or transformers takes a token 0 for padding
    want = theirs(name).generate(prompt, **options)
    with Generator(ours) as generator:
        sequence = generator.submit(Request(prompt[0].tolist(), max_new_tokens=20))
        generator.run()
    assert sequence.ids == want[0].tolist()
    assert torch.equal(hugging_face(ours).generate(prompt, **options), want)


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again(tmp_path, name):
    weights, config = imported(name)
    export(weights, config, None, tmp_path)
    again, same = import_pretrained(tmp_path)
    assert (same.model, same.ponder) == (config.model, config.ponder)
    assert again.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in again.items())


def on_ranks(mesh: Mesh, cases: dict[str, tuple[dict, Config]]) -> dict[str, tuple[float, dict]]:
    return {name: gradients(config, weights, mesh) for name, (weights, config) in cases.items()}


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tensor_ranks(sequence_parallel):
    cases = {name: imported(name) for name in MODELS}
    parts = run_distributed(on_ranks, 2, cases, tensor=2, sequence_parallel=sequence_parallel)
    for name, (weights, config) in cases.items():
        specs = {key: spec for key, _, spec, _ in declarations(built(config, weights))}
        whole = {key: specs[key].unshard([part[name][1][key] for part in parts]) for key in specs}
        assert_same_gradients(name, parts[0][name][0], whole)


def test_configurations_of_older_versions():
    """`rope_scaling` with `type` and the base beside it, as files had it before `rope_parameters`."""
    new = written(MODELS["llama 3.2"])
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    for kind in ({"type": "llama3"}, {"rope_type": "llama3"}, {"type": "llama3", "rope_type": "llama3"}):
        assert settings(old | {"rope_theta": 500.0, "rope_scaling": scaling | kind}) == settings(new)
    # Qwen's released files mention a window that is not used, Mistral's first had one, Yarn's factor may be left out
    qwen = written(MODELS["qwen2"], use_sliding_window=False, sliding_window=32, max_window_layers=1, use_mrope=False)
    assert settings(qwen) == settings(written(MODELS["qwen2"]))
    yarn = {key: value for key, value in YARN.items() if key != "factor"}
    assert settings(written(MODELS["qwen2.5"], rope_parameters=yarn)) == settings(written(MODELS["qwen2.5"]))
    scaled = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}
    model = read_config(settings(written(MODELS["qwen2.5"], rope_parameters=scaled))).model
    assert model.rope_attention_factor == pytest.approx(1.13862944 / 1.06931472)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"sliding_window": 32}, "sliding_window 32 in config.json hides tokens in sequences of up to"),
        ("mistral", {"sliding_window": "absent", "max_position_embeddings": 5000}, "sliding_window 4096 in"),
        ("mistral", {"num_key_value_heads": None}, "config.json lacks num_key_value_heads"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "set max_position_embeddings there to 32"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types ['sliding_attention', "),
        ("qwen2", {"use_mrope": True}, "use_mrope True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers [1, 0] in config.json is something PonderLM does not"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layer_interval 2"),
        ("smollm3", {"num_hidden_layers": 10**9, "no_rope_layers": None}, "no_rope_layer_interval"),
        ("llama 3", {"attention_bias": True}, "attention_bias True"),
        ("llama 3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type longrope in rope_parameters"),
        ("llama 3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "type dynamic in"),
        ("llama 3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters {'"),
        ("llama 3.2", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, "rope_low_turns 1.0 must be below"),
        ("qwen2.5", {"rope_parameters": YARN | {"truncate": False}}, "truncate False in rope_parameters"),
        ("qwen2.5", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": -1.0}}, "mscale_all_dim -1.0 in"),
        ("qwen2.5", {"rope_parameters": YARN | {"factor": 0.5}}, "model.rope_factor is 0.5; its range is 1 to"),
    ],
)
def test_what_is_refused_by_name(name, changes, message):
    content = written(MODELS[name]) | changes
    with pytest.raises(UserError) as caught:
        read_config(settings({key: value for key, value in content.items() if value != "absent"}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_whatever_transformers_writes_is_known(name):
    content = json.loads(MODELS[name].to_json_string(use_diff=False))
    settings(content)
    with pytest.raises(UserError, match=r"^attn_logit_softcapping 50.0 in config.json is not known here"):
        settings(content | {"attn_logit_softcapping": 50.0})
