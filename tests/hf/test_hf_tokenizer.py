import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.hf.exported_tokenizer import ExportedTokenizer, export_tokenizer

# Characters that tokenizers treat in their own way, more often than chance would have them.
ODD = [" ", "  ", "\n", "\r\n", "\t", "\0", "\u2581", "\u2585", "\u2047", "</s>", "<s>", "<unk>", "<0x0A>", "\ufeff"]
USUAL = ["def f(x):\n    return x", "self", "=====", "#", "naïve", "数据", "🙂", "e\u0301", "\ufffd", "\u2028"]
TEXT = st.text() | st.lists(st.sampled_from(ODD + USUAL)).map("".join)


@pytest.fixture(scope="session")
def pair(sentencepiece_model, tmp_path_factory):
    """The tokenizer as trained, and as transformers loads it."""
    folder = tmp_path_factory.mktemp("exported")
    exported = export_tokenizer(sentencepiece_model.parent, folder, max_length=1 << 30)
    assert exported == ExportedTokenizer(pieces=1024, eod_id=2, pad_id=0)
    assert (folder / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    return load_tokenizer(sentencepiece_model), PreTrainedTokenizerFast.from_pretrained(folder)


def test_source_text(pair, sources):
    ours, theirs = pair
    for path in sources:
        text = path.read_text(encoding="utf-8")
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


@settings(max_examples=500)
@given(TEXT)
@example(" leading, trailing ")
@example("\n\n    \n")
def test_any_text(pair, text):
    """In training "</s>" in a text is text. `split_special_tokens=True` says so; unless it is said, it is the token."""
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs(text, split_special_tokens=True)["input_ids"] == ids
    assert (theirs(text)["input_ids"] == ids) != any(
        str(token) in text for token in theirs.added_tokens_decoder.values()
    )
    assert theirs.decode(ids) == text
    assert theirs.decode([*ids, ours.eod_id], skip_special_tokens=True) == text


def test_special_tokens(pair):
    ours, theirs = pair
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 2, 2, 0)
    assert ours.eod_id == 2
    assert len(theirs) == ours.vocab_size
    assert set(theirs("x")) == {"input_ids", "attention_mask"}
    assert theirs.decode([*ours.encode("x"), 5000]) == "x"  # an id without a piece


def test_an_end_that_is_written_is_one_and_so_are_tokens_added_later(pair, tmp_path):
    ours, theirs = pair
    assert theirs("x = 1" + theirs.eos_token)["input_ids"] == [*ours.encode("x = 1"), ours.eod_id]
    theirs.save_pretrained(tmp_path)
    more = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    more.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    more.add_tokens(["<|tool|>"])
    assert more("<|user|>x<|tool|></s>")["input_ids"] == [1024, *ours.encode("x"), 1025, 2]
    more.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("<|user|>x<|tool|></s>")["input_ids"] == [1024, *ours.encode("x"), 1025, 2]


def test_a_collator_leaves_padding_alone_out_of_the_loss(pair):
    ours, theirs = pair
    samples = [{"input_ids": theirs(text + theirs.eos_token)["input_ids"]} for text in ("x", "a longer text")]
    labels = DataCollatorForLanguageModeling(theirs, mlm=False)(samples)["labels"]
    assert labels[:, -1].tolist() == [ours.eod_id] * 2
    assert (labels == -100).sum(1).tolist() == [len(samples[1]["input_ids"]) - len(samples[0]["input_ids"]), 0]


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
    export_tokenizer(path, folder, max_length=64)
    ours = load_tokenizer(path)
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
    assert (written["bos_token"], written["eos_token"], written["model_max_length"]) == ("</s>", "</s>", 64)


@pytest.mark.parametrize(
    ("others", "config", "expected"),
    [
        ([], {}, None),
        ([], {"pad_token": "<|end|>"}, None),
        (["<|padding|>"], {"pad_token": {"content": "<|end|>", "special": True}}, "<|padding|>"),
        (["<|padding|>", "<own>"], {"pad_token": "<own>"}, "<own>"),
        (["<start>"], {"bos_token": "<start>"}, None),
        (["<s>"], {"bos_token": "<|end|>"}, None),
    ],
)
def test_padding_of_a_hugging_face_tokenizer(tmp_path, others, config, expected):
    """It is never the end of documents; where every piece is in use, there is none."""
    bytes_of = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: index for index, piece in enumerate(bytes_of)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(False),
        tokenizers.decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(["<|end|>", *others])
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "add_prefix_space": False} | config
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>", "pad_token": "<|end|>"}))
    exported = export_tokenizer(source, target, max_length=64)
    theirs = PreTrainedTokenizerFast.from_pretrained(target)
    assert (theirs.eos_token, theirs.pad_token) == ("<|end|>", expected)
    assert exported == ExportedTokenizer(257 + len(others), 256, tokenizer.token_to_id(expected) if expected else None)
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert {role: name for role, name in written.items() if role != "pad_token"} == {
        role: name for role, name in config.items() if role != "pad_token"
    }
