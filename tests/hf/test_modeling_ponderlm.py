import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_ponder.hf.configuration_ponderlm import PonderLMConfig
from megatron_ponder.hf.layers_ponderlm import fold
from megatron_ponder.hf.modeling_ponderlm import CACHE, PonderLMForCausalLM, document_layout
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.ponder import PonderLM
from tests.grids import in_pairs
from tests.hf.exported import hugging_face
from tests.model.test_features import COMBINATIONS
from tests.models import LEARNED, MIXED, random_tokens, small_config, small_model

LLAMA = {"model__family": "llama", "model__num_kv_heads": 2}
GPT_NEOX = {"model__family": "gpt_neox"}
MODES = [
    {"ponder__mode": "vanilla"},
    {"ponder__mode": "fixed"},
    {"ponder__mode": "pause"},
    {"ponder__mode": "sps", "ponder__latent_steps": 3},
    {"ponder__latent_visibility": "own", "inference__threshold": 0.3, "ponder__latent_steps": 3},
    {"ponder__mode": "loop"},
    {"ponder__mode": "ponderlm", "model__vocab_size": 173},
    {"inference__threshold": 0.1, "ponder__latent_scale": 0.3},
    {"inference__threshold": 0.3, "ponder__latent_steps": 3, "inference__router_bias": 0.2} | LEARNED,
]


def varied_model(**overrides):
    """A model whose tokens really take different numbers of steps."""
    return small_model(router_scale=4.0, **overrides)


@pytest.mark.parametrize(
    ("family", "mode", "refinements"),
    in_pairs([LLAMA, GPT_NEOX, GPT_NEOX | {"model__residual": "sequential"}], MODES, [0, 2]),
)
@torch.no_grad()
def test_forward_equals_the_model(family, mode, refinements):
    model = varied_model(**family, **mode)
    tokens = random_tokens(3, 12)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = model.to(dtype)
        expected = model.jacobi(tokens, refinements, model.rule("hard"))
        got = hugging_face(model, refinements)(tokens)
        logits = model.head(expected.output_BLH)
        assert (got.logits - logits).abs().max() < tolerance * logits.abs().max()
        if model.router is None:
            assert (got.executed_steps == model.ponder_config.steps).all()
        else:
            assert torch.equal(got.executed_steps, expected.routing.executed)
            assert len(got.executed_steps.unique()) == model.ponder_config.steps + 1


@torch.no_grad()
def test_every_combination_of_features():
    base, tokens = small_config(model__num_layers=1, ponder__mode="vanilla"), random_tokens(1, 6)
    for features in COMBINATIONS:
        model = PonderLM(replace(base.model, **features), base.ponder).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        expected = model.head(model.jacobi(tokens, 0, model.rule("hard")).output_BLH)
        assert (hugging_face(model, 0)(tokens).logits - expected).abs().max() < 1e-10, features


@pytest.mark.parametrize(
    "option",
    [{"ponder__router_hidden_size": 8}, {"model__tie_embeddings": True}, {"model__rope_theta": 500.0}],
)
@torch.no_grad()
def test_options_of_the_model(option):
    model = varied_model(**option)
    tokens = random_tokens(2, 10)
    expected = model.head(model.jacobi(tokens, 1, model.rule("hard")).output_BLH)
    assert (hugging_face(model, 1)(tokens).logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("family", "mode"),
    [*((family, mode) for family in (LLAMA, GPT_NEOX) for mode in MODES), (MIXED, {"inference__threshold": 0.1})],
)
def test_the_cache_equals_the_fixed_point(family, mode):
    model = varied_model(**family, **mode)
    tokens = random_tokens(3, 14)
    exact = model.exact(tokens, model.rule("hard"))
    got = hugging_face(model)(tokens, use_cache=True)
    assert (got.logits - model.head(exact.output_BLH)).abs().max() < 1e-10
    cache = got.past_key_values
    if model.router is not None:
        assert torch.equal(cache.executed_steps, exact.routing.executed)
        assert len(cache.executed_steps.unique()) == model.ponder_config.steps + 1
    assert cache.get_seq_length() == 14
    kept = 0 if model.passes.own else cache.executed_steps.sum(1)
    assert (cache.lengths == 14 + kept).all()


def test_pruned_steps_do_not_run():
    model = varied_model(inference__threshold=0.3)
    twin = hugging_face(model)
    rows = []
    twin.model.layers[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    executed = twin(random_tokens(4, 9), use_cache=True).executed_steps
    assert 0 < executed.sum() < 4 * 9 * 2
    assert sum(rows) == 4 * 9 + executed.sum()


@torch.no_grad()
def oracle(model, tokens, new):
    """Greedy continuation by the fixed point over the whole growing sequence, and K̂ of all tokens that were run."""
    for _ in range(new):
        exact = model.exact(tokens, model.rule("hard"))
        tokens = torch.cat([tokens, model.head(exact.output_BLH[:, -1:]).argmax(-1)], 1)
    executed = None if exact.routing is None else exact.routing.executed
    return tokens, executed


@pytest.mark.parametrize("family", [LLAMA, GPT_NEOX])
@pytest.mark.parametrize("mode", MODES)
def test_generation_equals_the_fixed_point(family, mode):
    model = varied_model(**family, **mode)
    prompt = random_tokens(1, 5)
    expected, executed = oracle(model, prompt, 12)
    got = hugging_face(model).generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    assert got.past_key_values.executed_steps.shape == (1, 16)
    if executed is not None:
        assert torch.equal(got.past_key_values.executed_steps, executed)
        assert len(executed.unique()) > 1


def test_rows_of_a_batch_decide_for_themselves():
    model = varied_model(inference__threshold=0.3)
    prompts = random_tokens(3, 6)
    batch = hugging_face(model).generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, return_dict_in_generate=True
    )
    for row, prompt in enumerate(prompts):
        expected, executed = oracle(model, prompt[None], 8)
        assert torch.equal(batch.sequences[row], expected[0])
        assert torch.equal(batch.past_key_values.executed_steps[row], executed[0])
    assert len(batch.past_key_values.lengths.unique()) > 1


def test_left_padding_changes_nothing():
    model = varied_model(inference__threshold=0.3)
    twin = hugging_face(model)
    short, long = random_tokens(1, 4, seed=1), random_tokens(1, 7, seed=2)
    ids = torch.cat([F.pad(short, (3, 0)), long])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    parallel = twin(ids, attention_mask=mask)
    for row, alone in enumerate((short, long)):
        tokens = alone.shape[1]
        expected = twin(alone)
        assert (parallel.logits[row, -tokens:] - expected.logits[0]).abs().max() < 1e-10
        assert torch.equal(parallel.executed_steps[row, -tokens:], expected.executed_steps[0])
    assert (parallel.executed_steps[0, :3] == 0).all()
    generated = twin.generate(ids, attention_mask=mask, max_new_tokens=6)
    for row, alone in enumerate((short, long)):
        assert torch.equal(generated[row, 7:], twin.generate(alone, max_new_tokens=6)[0, alone.shape[1] :])


def test_documents_are_kept_apart():
    eod_id = 7
    model = varied_model(inference__threshold=0.3, eod_id=eod_id)
    twin = hugging_face(model)
    tokens = random_tokens(2, 13)
    tokens[tokens == eod_id] = 8
    tokens[0, 5] = tokens[0, 6] = tokens[1, 2] = tokens[1, 12] = eod_id
    rule = model.rule("hard")
    expected = model.jacobi(tokens, 2, rule)
    assert (twin(tokens).logits - model.head(expected.output_BLH)).abs().max() < 1e-10
    exact, cached = model.exact(tokens, rule), twin(tokens, use_cache=True)
    assert (cached.logits - model.head(exact.output_BLH)).abs().max() < 1e-10
    last_document = 6 + cached.executed_steps[0, 7:].sum()
    assert cached.past_key_values.lengths[0] == last_document
    assert cached.past_key_values.positions.tolist() == [6, 10]
    generated = twin.generate(tokens[:, :7], attention_mask=torch.ones(2, 7), max_new_tokens=6)
    assert torch.equal(generated, oracle(model, tokens[:, :7], 6)[0])


def test_layout_of_documents_and_padding():
    """Attention sees differences of positions only, so that nothing else would notice positions that never restart."""
    eod_id, pad = 1, 1
    tokens = torch.tensor([[5, 1, 6, 7, 1, 1, 8, 9], [5, 6, 1, 7, 8, 9, 5, 1]])
    expected = Geometry.of(tokens, eod_id)
    positions, documents = document_layout(tokens, None, eod_id)
    assert torch.equal(positions, expected.positions_BL)
    assert torch.equal(documents, expected.segments_BL)

    padded = torch.tensor([[pad, pad, 5, 1, pad, 6, 7, pad]])
    present = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]]).bool()
    positions, documents = document_layout(padded, present, eod_id)
    assert positions[present].tolist() == [0, 1, 0, 1]
    assert documents.tolist() == [[-1, -1, 0, 0, -1, 1, 1, -1]]
    positions, documents = document_layout(padded, present, None)
    assert positions[present].tolist() == [0, 1, 2, 3]
    assert documents.tolist() == [[-1, -1, 0, 0, -1, 0, 0, -1]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-4), (torch.float32, 1e-6)])
def test_folded_keys_keep_their_weight(dtype, tolerance):
    log_w = -torch.linspace(0, 9.2, 50).unsqueeze(0)
    empty = torch.zeros(1, 2, 50, 8, dtype=dtype)
    q, k, _ = fold(empty, empty, empty, log_w)
    logits = (q.double() * k.double()).sum(-1) / math.sqrt(8)
    assert (logits - log_w).abs().max() < tolerance


def test_beam_search():
    model = varied_model(inference__threshold=0.3)
    twin = hugging_face(model, refinements=60)  # more passes than slots: the fixed point
    options = {"attention_mask": torch.ones(2, 4), "max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 3}
    cached = twin.generate(random_tokens(2, 4), **options)
    assert torch.equal(cached, twin.generate(random_tokens(2, 4), use_cache=False, **options))
    greedy = twin.generate(random_tokens(2, 4), attention_mask=torch.ones(2, 4), max_new_tokens=5)
    assert not torch.equal(cached[::3], greedy)


def test_going_on_from_a_cache():
    twin = hugging_face(varied_model(inference__threshold=0.3))
    prompt = random_tokens(1, 5)
    whole = twin.generate(prompt, max_new_tokens=9)
    first = twin.generate(prompt, max_new_tokens=4, return_dict_in_generate=True)
    rest = twin.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5)
    assert torch.equal(rest, whole)
    with pytest.raises(ValueError, match="at least one more"):
        twin.prepare_inputs_for_generation(prompt, past_key_values=first.past_key_values)


def test_the_cache_has_two_names():
    """That of transformers up to 5.23, and that since."""
    twin = hugging_face(varied_model(inference__threshold=0.3))
    tokens = random_tokens(1, 8)
    expected = twin(tokens, use_cache=True).logits[:, 5:]
    for name in ("past_key_values", "cache"):
        first = twin(tokens[:, :5], use_cache=True)
        assert CACHE in first
        assert (twin(tokens[:, 5:], **{name: first[CACHE]}).logits - expected).abs().max() < 1e-10
        first = twin(tokens[:, :5], use_cache=True)
        inputs = twin.prepare_inputs_for_generation(tokens[:, :6], **{name: first[CACHE]})
        assert torch.equal(inputs["input_ids"], tokens[:, 5:6])
        assert inputs[CACHE] is first[CACHE]


def test_what_the_cache_cannot_do_is_refused():
    twin = hugging_face(varied_model())
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        twin.generate(random_tokens(1, 5), prompt_lookup_num_tokens=2, max_new_tokens=5)
    cache = twin(random_tokens(1, 5), use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)


def test_the_threshold_can_be_changed_after_loading():
    twin = hugging_face(varied_model())
    tokens = random_tokens(1, 20)
    steps = []
    for threshold in (0.0, 0.1, 0.5, 1.0):
        twin.config.ponder_threshold = threshold
        steps.append(int(twin(tokens).executed_steps.sum()))
    assert steps[0] == 40
    assert steps[-1] == 0
    assert 40 > steps[1] > steps[2] > 0


def test_loss_and_its_gradient():
    twin = hugging_face(varied_model(inference__threshold=0.3).float())
    tokens = random_tokens(2, 8)
    labels = tokens.masked_fill(torch.arange(8) < 3, -100)
    output = twin(tokens, labels=labels)
    expected = F.cross_entropy(output.logits[:, 2:-1].flatten(0, 1), tokens[:, 3:].flatten())
    assert abs(output.loss - expected) < 1e-6
    output.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in twin.parameters())
    loss, logits, *_ = twin(tokens, labels=labels, return_dict=False)
    assert loss == output.loss
    assert torch.equal(logits, output.logits)


def test_fresh_weights():
    config = PonderLMConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = PonderLMForCausalLM(config)
    assert model.router.output.bias.tolist() == [0, 0, 0, 2]
    assert not model.router.output.weight.any()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.05)
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_saving_and_loading(tmp_path):
    twin = hugging_face(varied_model().float())
    twin.save_pretrained(tmp_path)
    loaded = PonderLMForCausalLM.from_pretrained(tmp_path)  # which initialises again whatever it takes for missing
    expected = twin.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_what_is_missing_is_initialised_and_no_more(tmp_path):
    twin = hugging_face(varied_model().float())
    twin.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["router.output.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = PonderLMForCausalLM.from_pretrained(tmp_path).state_dict()
    assert not loaded.pop("router.output.weight").any()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_family", "gpt2"),
        *(("norm", "batch"), ("biases", "some"), ("hidden_act", "relu")),
        *(("ponder_mode", "often"), ("ponder_threshold", 1.5), ("ponder_confidence_exit", "margin")),
    ],
)
def test_configurations_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must"):
        PonderLMConfig(**{name: value})
