import io
import json

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_ponder.errors import UserError
from megatron_ponder.hf.tokenizer import export_tokenizer

# Characters that tokenizers treat in their own way, more often than chance would have them.
ODD = [" ", "  ", "\n", "\r\n", "\t", "\0", "\u2581", "\u2585", "\u2047", "</s>", "<s>", "<unk>", "<0x0A>", "\ufeff"]
USUAL = ["def f(x):\n    return x", "self", "=====", "#", "naïve", "数据", "🙂", "e\u0301", "\ufffd", "\u2028"]
TEXT = st.text() | st.lists(st.sampled_from(ODD + USUAL)).map("".join)


@pytest.fixture(scope="session")
def pair(sentencepiece_model, tmp_path_factory):
    """The tokenizer as trained, and as transformers loads it."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = export_tokenizer(sentencepiece_model.parent, folder, max_length=1 << 30)
    assert (folder / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    return tokenizer, PreTrainedTokenizerFast.from_pretrained(folder)


def test_source_text(pair, sources):
    ours, theirs = pair
    for path in sources:
        text = path.read_text(encoding="utf-8")
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


@settings(max_examples=500, deadline=None)
@given(TEXT)
@example(" leading, trailing ")
@example("\n\n    \n")
def test_any_text(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.decode([*ids, ours.eod_id], skip_special_tokens=True) == text


def test_special_tokens(pair):
    ours, theirs = pair
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, ours.bos_id, ours.eod_id) == (0, 1, 2)
    assert len(theirs) == ours.vocab_size
    assert set(theirs("x")) == {"input_ids", "attention_mask"}


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a hat on a cat", "that cat sat"] * 20),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 290, "byte_fallback": True, "model_type": "bpe", "hard_vocab_limit": False} | options,
    )
    return model.getvalue()


def test_a_dummy_prefix(tmp_path):
    """As the first Llama models have."""
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(**plain))
    folder = tmp_path / "exported"
    folder.mkdir()
    ours = export_tokenizer(path, folder, max_length=64)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("the cat", " the cat", "", "a  hat\n", "Zürich"):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.convert_ids_to_tokens(ours.encode("the cat"))[0].startswith(" ")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "user_defined_symbols": ["cat"]},
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(train(**options))
    (tmp_path / "exported").mkdir()
    with pytest.raises(UserError, match=r"no plain byte-pair model .* put its tokenizer\.json beside it"):
        export_tokenizer(tmp_path, tmp_path / "exported", max_length=64)


def test_a_hugging_face_tokenizer_is_copied(pair, tmp_path):
    _, theirs = pair
    theirs.save_pretrained(tmp_path / "source")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    export_tokenizer(tmp_path / "source", tmp_path / "first", max_length=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    export_tokenizer(tmp_path / "source", tmp_path / "second", max_length=64)
    written = json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    assert (written["bos_token"], written["eos_token"], written["model_max_length"]) == ("<s>", "</s>", 64)
