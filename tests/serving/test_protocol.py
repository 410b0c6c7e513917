import pytest

from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.serving.protocol import ServedModel, parse, requests_for, token_text
from megatron_ponder.serving.refusals import RefusedError


@pytest.fixture(scope="module")
def model(corpus) -> ServedModel:
    return ServedModel("small", load_tokenizer(corpus.tokenizer), 64, 0)


def refused(body: str) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse(body.encode())
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ("{", None, "invalid JSON"),
        ("[1]", None, "must be a JSON object"),
        ('{"prompt": "\\ud800"}', None, "invalid JSON"),
        ('{"max_token": 5}', "max_token", "no parameter 'max_token'; leave it out"),
        ('{"prompt": []}', "prompt", "give at least one prompt"),
        ('{"prompt": [[1], []]}', "prompt", "one of the prompts has no tokens; give at least one"),
        ('{"prompt": [true]}', "prompt", "must be a text, a list of texts, token ids"),
        ('{"prompt": ["a", [1]]}', "prompt", "must be a text, a list of texts, token ids"),
        ('{"max_tokens": 1.5}', "max_tokens", "valid integer"),
        ('{"max_tokens": -1}', "max_tokens", "greater than or equal to 0"),
        ('{"n": true}', "n", "valid integer"),
        ('{"temperature": Infinity}', "temperature", "finite"),
        ('{"temperature": 2.5}', "temperature", "less than or equal to 2"),
        ('{"top_p": 0}', "top_p", "greater than 0"),
        ('{"logprobs": 6}', "logprobs", "less than or equal to 5"),
        ('{"stop": ["a", "b", "c", "d", "e"]}', "stop", "at most 4"),
        ('{"stop": [3]}', "stop.0", "valid string"),
        ('{"seed": 9223372036854775808}', "seed", "less than"),
        ('{"suffix": "b"}', "suffix", "is not supported: the model continues texts"),
        ('{"presence_penalty": 0.1}', "presence_penalty", "or use repetition_penalty"),
        ('{"frequency_penalty": -1}', "frequency_penalty", "or use repetition_penalty"),
        ('{"logit_bias": {"5": 1}}', "logit_bias", "is not supported; leave it out"),
        ('{"echo": true, "logprobs": 0}', "logprobs", "together with echo"),
        ('{"stream_options": {"include_usage": true}}', "stream_options", "set stream to true"),
        ('{"n": 3, "best_of": 2}', "best_of", "must be at least n, which is 3"),
        ('{"n": 1, "best_of": 2, "stream": true}', "best_of", "cannot be streamed"),
    ],
)
def test_refusals_name_the_parameter(body, param, words):
    refusal = refused(body)
    assert (refusal.status, refusal.param) == (400, param)
    assert words in str(refusal)
    assert refusal.content["error"]["type"] == "invalid_request_error"


def test_null_is_the_default(model):
    names = parse(b"{}").model_dump()
    nothing = "{" + ", ".join(f'"{name}": null' for name in names) + "}"
    assert parse(nothing.encode()) == parse(b"{}")
    request = requests_for(parse(b"{}"), model, 1)[0]
    assert request.prompt == (model.tokenizer.eod_id,)
    assert request.max_new_tokens == 16
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    assert request.stop_ids == {model.tokenizer.eod_id}


def test_what_changes_nothing_is_accepted():
    parse(
        b'{"suffix": "", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "a", "best_of": 1}'
    )


def test_requests_and_their_seeds(model):
    body = b'{"prompt": [[5], [7, 8]], "n": 3, "seed": 9223372036854775806, "max_tokens": 4, "logprobs": 2}'
    requests = requests_for(parse(body), model, 6)
    assert [request.prompt for request in requests] == 3 * [(5,)] + 3 * [(7, 8)]
    assert [request.sampling.seed for request in requests] == 2 * [(1 << 63) - 2, (1 << 63) - 1, 0]
    assert {request.top_log_probabilities for request in requests} == {2}
    texts = requests_for(parse(b'{"prompt": ["a b", "c"]}'), model, 2)
    assert [request.prompt for request in texts] == [tuple(model.tokenizer.encode(text)) for text in ("a b", "c")]
    assert 0 <= requests_for(parse(b'{"seed": -5}'), model, 1)[0].sampling.seed < 1 << 63
    drawn = requests_for(parse(b'{"n": 8}'), model, 8)
    assert len({request.sampling.seed for request in drawn}) == 8


def test_ends(model):
    eod = model.tokenizer.eod_id
    assert requests_for(parse(b'{"stop_token_ids": [7]}'), model, 1)[0].stop_ids == {7, eod}
    assert requests_for(parse(b'{"ignore_eos": true}'), model, 1)[0].stop_ids == frozenset()
    assert requests_for(parse(b'{"stop": "x"}'), model, 1)[0].stop_strings == ("x",)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "other"}', 404, "model_not_found"),
        (b'{"prompt": [1, 2, 3], "max_tokens": 62}', 400, "context_length_exceeded"),
        (b'{"prompt": ["a", "b", "c", "d"], "n": 2}', 400, "invalid_value"),
        (b'{"stop": ""}', 400, "invalid_value"),
    ],
)
def test_what_this_model_cannot_do(model, body, status, code):
    with pytest.raises(RefusedError) as caught:
        requests_for(parse(body), model, 7)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_texts_of_tokens(model):
    tokenizer = model.tokenizer
    text = "def f(x):\n    return x + 1\n"
    assert "".join(token_text(tokenizer, token) for token in tokenizer.encode(text)) == text
    assert [token_text(tokenizer, token) for token in tokenizer.encode("☕")] == ["<0xE2>", "<0x98>", "<0x95>"]
    assert token_text(tokenizer, tokenizer.eod_id) == "</s>"
