"""Generation as users of transformers know it: batches, padding, sampling, beams, streaming, pipelines, refusals."""

import gc
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

from megatron_ponder.generation.generate import generate
from megatron_ponder.hf.export import export
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from megatron_ponder.model.exits import Exit
from tests.grids import in_pairs
from tests.hf.exported import hugging_face, weights_of
from tests.models import random_tokens, small_config, small_model

FAMILIES = [{"model__family": "llama", "model__num_kv_heads": 2}, {"model__family": "gpt_neox"}]
MODES = [{"ponder__mode": mode} for mode in ("vanilla", "fixed", "pause", "sps", "loop", "ponderlm")]
MODES.append({"inference__threshold": 0.3})
LENGTHS = [4, 9, 1, 6]
EOD = 7


def varied_model(**overrides):
    """A model whose tokens really take different numbers of steps."""
    return small_model(router_scale=4.0, **overrides)


def prompts_of(lengths) -> list[torch.Tensor]:
    """Different prompts, int64 (1, length) each."""
    return [random_tokens(1, length, seed=length) for length in lengths]


def padded(prompts, side: str, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of prompts, and its attention mask; `both` puts padding before, after and in the middle."""
    width = max(prompt.shape[1] for prompt in prompts) + (2 if side == "both" else 0)
    rows, masks = [], []
    for prompt in prompts:
        free = width - prompt.shape[1]
        before = {"left": free, "right": 0, "both": free // 2}[side]
        places = torch.arange(prompt.shape[1]) + before
        if side == "both" and prompt.shape[1] > 1:
            places[1:] += free - before  # the rest of the padding follows the first token
        rows.append(torch.full((width,), pad).scatter(0, places, prompt[0]))
        masks.append(torch.zeros(width, dtype=torch.long).scatter(0, places, 1))
    return torch.stack(rows), torch.stack(masks)


@pytest.fixture
def logged():
    """What transformers logs and Python warns of, from here on."""
    gc.collect()  # what earlier tests have left open warns now
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [*messages, *(str(item.message) for item in caught)]
    logger.removeHandler(handler)


@pytest.mark.parametrize("exit", ["entropy:3.4", "margin:0.05"])
def test_a_confidence_exit_is_that_of_the_model(exit):
    model = small_model(ponder__mode="fixed", ponder__latent_steps=3).eval()
    with torch.no_grad():
        model.head.weight *= 12
    twin, tokens, rule = hugging_face(model), random_tokens(2, 12), model.rule("hard", exit=Exit.read(exit))
    twin.config.ponder_confidence_exit = exit
    want, got = model.exact(tokens, rule), twin(tokens)
    assert torch.equal(got.executed_steps, want.routing.executed)
    assert len(got.executed_steps.unique()) == 4
    assert (got.logits - model.head(want.output_BLH)).abs().max() < 1e-9
    assert got.past_key_values is None
    (alone,) = generate(model, [tokens[0].tolist()], 8, rule=rule)
    continued = twin.generate(tokens[:1], max_new_tokens=8, return_dict_in_generate=True)
    assert continued.sequences[0, 12:].tolist() == alone.tokens
    assert continued.past_key_values.executed_steps[0].tolist() == alone.executed_steps
    with pytest.raises(ValueError, match="no ponder_confidence_exit"):
        twin.train()(tokens, labels=tokens)
    twin.config.ponder_mode = "loop"
    with pytest.raises(ValueError, match="for ponder_mode fixed, not for loop"):
        twin(tokens)


@pytest.mark.parametrize(("family", "mode", "side"), in_pairs(FAMILIES, MODES, ["left", "right", "both"]))
def test_a_padded_batch_gives_what_each_prompt_gives_alone(family, mode, side):
    twin = hugging_face(varied_model(**family, **mode))
    prompts = prompts_of(LENGTHS)
    ids, mask = padded(prompts, side)
    batch = twin.generate(ids, attention_mask=mask, max_new_tokens=10, return_dict_in_generate=True, output_logits=True)
    for row, prompt in enumerate(prompts):
        alone = twin.generate(prompt, max_new_tokens=10, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(batch.sequences[row, ids.shape[1] :], alone.sequences[0, prompt.shape[1] :])
        for together, single in zip(batch.logits, alone.logits, strict=True):
            assert (together[row] - single[0]).abs().max() < 1e-10
        executed = batch.past_key_values.executed_steps[row]
        kept = torch.cat([mask[row], torch.ones(9, dtype=torch.long)]).bool()
        assert torch.equal(executed[kept], alone.past_key_values.executed_steps[0])
        assert not executed[~kept].any()
    assert len({tuple(row) for row in batch.sequences[:, ids.shape[1] :].tolist()}) > 1


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_from_padded_prompts(side, use_cache):
    """With the passes at their fixed point, what is drawn is the same with and without padding and cache."""
    twin = hugging_face(varied_model(inference__threshold=0.3), refinements=60)
    prompts = prompts_of([5, 3])
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.0}
    options |= {"max_new_tokens": 6, "num_return_sequences": 3}
    torch.manual_seed(4)
    ids, mask = padded(prompts, side)
    got = twin.generate(ids, attention_mask=mask, use_cache=use_cache, **options)[:, ids.shape[1] :]
    torch.manual_seed(4)
    ids, mask = padded(prompts, "left")
    expected = twin.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert torch.equal(got, expected)
    assert len({tuple(row) for row in got.tolist()}) == 6


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0, "temperature": 5.0}, {"num_beams": 3}])
@pytest.mark.parametrize("use_cache", [True, False])
def test_ids_without_a_piece_are_never_generated(options, use_cache):
    twin = hugging_face(varied_model(inference__threshold=0.3))
    tokens = random_tokens(2, 5, vocab_size=40)
    options = options | {"max_new_tokens": 30, "use_cache": use_cache}
    assert int(twin.generate(tokens, **options).max()) > 39
    expected = twin(tokens).logits
    twin.config.ponder_pieces = 40
    assert torch.equal(twin(tokens).logits, expected)
    torch.manual_seed(0)
    details = twin.generate(tokens, return_dict_in_generate=True, output_logits=True, **options)
    assert int(details.sequences.max()) <= 39
    assert all(
        bool(step[:, 40:].eq(-torch.inf).all()) and bool(step[:, :40].isfinite().all()) for step in details.logits
    )
    twin.resize_token_embeddings(64)  # whoever adds tokens wants them generated
    assert twin.config.ponder_pieces == 64
    assert int(twin.generate(tokens, do_sample=True, temperature=5.0, max_new_tokens=60, top_k=0).max()) > 39


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_of_padded_prompts(side):
    twin = hugging_face(varied_model(inference__threshold=0.3))
    prompts = prompts_of([6, 2])
    ids, mask = padded(prompts, side)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    batch = twin.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = twin.generate(prompt, **options)[:, prompt.shape[1] :]
        assert torch.equal(batch[2 * row : 2 * row + 2], alone)
        assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_padded_batches(family):
    """A token that ends a document in the prompt, at its end, in what is generated, and as padding."""
    model = varied_model(inference__threshold=0.3, eod_id=EOD, **family)
    twin = hugging_face(model)
    prompts = prompts_of([5, 8, 3])
    for prompt in prompts:
        prompt[prompt == EOD] = 8
    prompts[1][0, 2] = prompts[1][0, 3] = prompts[2][0, -1] = EOD
    for side in ("left", "right", "both"):
        ids, mask = padded(prompts, side, pad=EOD)
        parallel = twin(ids, attention_mask=mask)
        force = LogitsProcessorList([EndAt(2)])
        batch = twin.generate(ids, attention_mask=mask, max_new_tokens=6, logits_processor=force, eos_token_id=None)
        for row, prompt in enumerate(prompts):
            expected = twin(prompt)
            assert (parallel.logits[row][mask[row].bool()] - expected.logits[0]).abs().max() < 1e-10
            tokens = prompt
            for step in range(6):
                exact = model.exact(tokens, model.rule("hard"))
                logits = model.head(exact.output_BLH[:, -1:])
                following = torch.tensor([[EOD]]) if step == 2 else logits.argmax(-1)
                tokens = torch.cat([tokens, following], 1)
            assert torch.equal(batch[row, ids.shape[1] :], tokens[0, prompt.shape[1] :])


class EndAt:
    """Lets every sequence end its document at one generated token."""

    def __init__(self, step: int) -> None:
        self._step, self._first = step, None

    def __call__(self, input_ids, scores):
        self._first = input_ids.shape[1] if self._first is None else self._first
        if input_ids.shape[1] - self._first != self._step:
            return scores
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([EOD]), 0.0)


def test_sequences_that_end_early_do_not_disturb_the_others():
    twin = hugging_face(varied_model(inference__threshold=0.3))
    prompts = prompts_of(LENGTHS)
    alone = [twin.generate(prompt, max_new_tokens=8)[0, prompt.shape[1] :] for prompt in prompts]
    end = int(alone[0][2])  # which the first generates third
    ids, mask = padded(prompts, "left")
    batch = twin.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=end, pad_token_id=60)
    lengths = []
    for row, single in enumerate(alone):
        stops = (single == end).nonzero()
        lengths.append(int(stops[0]) + 1 if len(stops) else 8)
        expected = F.pad(single[: lengths[-1]], (0, 8 - lengths[-1]), value=60)
        assert torch.equal(batch[row, ids.shape[1] :], expected[: batch.shape[1] - ids.shape[1]])
    assert min(lengths) < max(lengths)


@pytest.fixture(scope="module")
def exported(sentencepiece_model, tmp_path_factory):
    """An adaptive export with a tokenizer."""
    options = {"model__vocab_size": 1024, "inference__threshold": 0.3, "model__max_position_embeddings": 64}
    folder = tmp_path_factory.mktemp("generation") / "exported"
    export(weights_of(varied_model(**options)), small_config(**options), sentencepiece_model, folder)
    return folder


def test_defaults_for_generation_are_saved(exported):
    defaults = GenerationConfig.from_pretrained(exported)
    assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == (2, 2, 0)
    model = PonderLMForCausalLM.from_pretrained(exported).eval()
    prompt = random_tokens(1, 60)
    assert model.generate(prompt, eos_token_id=None).shape == (1, 64)  # max_position_embeddings
    first = int(model.generate(prompt, max_new_tokens=1)[0, -1])
    model.generation_config.eos_token_id = first
    assert model.generate(prompt).shape == (1, 61)


def test_generation_warns_of_nothing(exported, logged):
    model = PonderLMForCausalLM.from_pretrained(exported).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    inputs = tokenizer(["import os", "def main(argv):"], return_tensors="pt", padding=True)
    assert inputs["attention_mask"].sum() < inputs["attention_mask"].numel()
    model.generate(**inputs, max_new_tokens=4)
    model.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=0.7, top_p=0.9)
    model.generate(**inputs, max_new_tokens=4, num_beams=2)
    assert logged() == []


def test_the_tokenizer_pads_on_the_left(exported):
    """As transformers wants it of models that generate, which warns otherwise."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    inputs = tokenizer(["import os", "def main(argv):"], return_tensors="pt", padding=True)
    assert inputs["attention_mask"][:, -1].all()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_streaming(exported, capsys):
    model = PonderLMForCausalLM.from_pretrained(exported).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    inputs = tokenizer("def main():", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=8, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(generated[0]) + "\n"


def test_stop_strings_and_least_lengths(exported):
    model = PonderLMForCausalLM.from_pretrained(exported).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    inputs = tokenizer("def main():", return_tensors="pt")
    free = model.generate(**inputs, max_new_tokens=8)
    prompt = inputs["input_ids"].shape[1]
    third = tokenizer.decode(free[0, prompt + 2])
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, [third])])
    stopped = model.generate(**inputs, max_new_tokens=8, stopping_criteria=stop)
    assert prompt < stopped.shape[1] <= prompt + 3
    assert torch.equal(stopped[0], free[0, : stopped.shape[1]])
    least = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(prompt, 4, int(free[0, prompt]))])
    longer = model.generate(**inputs, max_new_tokens=8, eos_token_id=int(free[0, prompt]), logits_processor=least)
    assert longer.shape[1] >= prompt + 4


def test_a_cache_that_does_not_fit_is_refused():
    twin = hugging_face(varied_model())
    prompt = random_tokens(2, 5)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, which has one entry a token; leave it"):
        twin(prompt, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        twin.generate(prompt, attention_mask=torch.ones(2, 5), past_key_values=DynamicCache(), max_new_tokens=2)
    cache = twin(prompt[:1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values has 1 sequences, but input_ids 2"):
        twin(prompt, past_key_values=cache)


def test_what_is_no_token_id_is_refused():
    twin = hugging_face(varied_model())
    prompt = random_tokens(1, 5)
    embeds = twin.model.embed(prompt)
    with pytest.raises(ValueError, match="inputs_embeds"):
        twin.generate(inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(ValueError, match="does not take inputs_embeds; give input_ids"):
        twin(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="needs input_ids"):
        twin()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.arange(5)[None]}, "does not take position_ids; leave it out: positions follow from"),
        ({"output_hidden_states": True}, "does not take output_hidden_states; register a forward hook"),
        ({"output_attentions": True}, "does not take output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"attention_mask has shape \(1, 1, 5, 5\); it must be \(1, 5\)"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\); it must be \(1, 5\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\); it must be \(1, 5\)"),
    ],
)
def test_arguments_that_forward_does_not_take(arguments, message):
    twin = hugging_face(varied_model())
    with pytest.raises(ValueError, match=message):
        twin(random_tokens(1, 5), **arguments)
    assert twin(random_tokens(1, 5), **dict.fromkeys(arguments)).logits.shape == (1, 5, 61)  # None is no argument


def test_a_cached_loss_in_training_is_refused():
    twin = hugging_face(varied_model())
    tokens = random_tokens(1, 5)
    assert twin(tokens, labels=tokens, use_cache=True).loss > 0
    with pytest.raises(ValueError, match="with a cache there are no gradients; train with use_cache=False"):
        twin.train()(tokens, labels=tokens, use_cache=True)
