"""Parts of a text that are encoded apart from each other have the tokens of the whole, or there is no such rule."""

import io
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ponder.data import segment_cache
from megatron_ponder.data.segment_cache import CachedEncoder
from megatron_ponder.data.separable_parts import separable_parts
from megatron_ponder.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

LIKE_OURS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
}
AWKWARD = [" ", "  ", "\n", "\t", "\r\n", "\0", "\u2581", "\u2581 ", "\u3000", "數", "数据", "🙂", "naïve", "\ufffd"]
AWKWARD += ["self._x", "):\n        ", "''", "9.5e-3", "</s>", "<0x41>", "\u0301", "J", "Ж", "return\n\n"]
TEXT = st.text() | st.lists(st.sampled_from(AWKWARD) | st.text(max_size=3)).map("".join)


def train(sources, **changes) -> bytes:
    model = io.BytesIO()
    sentences = [line for path in sources for line in path.read_text().splitlines(keepends=True) if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 800, **LIKE_OURS, **changes},
    )
    return model.getvalue()


def encoder_of(model: bytes, folder: Path) -> CachedEncoder:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return CachedEncoder(load_tokenizer(folder), np.dtype("<i4"))


def ids(encoder: CachedEncoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode(text), "<i4").tolist()


# Models about which a rule is known: with bytes for unknown characters, with one token for a run of them, and with
# spaces that are merged into words alone.
RULED = {
    "ours": {},
    "no bytes": {"byte_fallback": False},
    "few characters": {"byte_fallback": False, "character_coverage": 0.98, "vocab_size": 300},
    "few characters and bytes": {"character_coverage": 0.98, "vocab_size": 500},
    "no runs of spaces": {"allow_whitespace_only_pieces": False},
    "mixed scripts": {"split_by_unicode_script": False, "split_by_number": False},
    "digits": {"split_digits": True},
}


@pytest.fixture(scope="module")
def encoders(source_files, tmp_path_factory) -> dict[str, CachedEncoder]:
    folder = tmp_path_factory.mktemp("models")
    return {name: encoder_of(train(source_files[:6], **changes), folder / name) for name, changes in RULED.items()}


@pytest.mark.parametrize("name", RULED)
@settings(max_examples=300)
@given(text=TEXT)
@example(text="a\u2581 \u2581b  c\n   d ")
@example(text="§§ §\u2581§ 数a数 b")
@example(text="    ")
def test_parts_have_the_tokens_of_the_whole(encoders, name, text):
    encoder = encoders[name]
    assert isinstance(encoder.tokenizer, SentencePieceTokenizer)
    parts = encoder.tokenizer.separable.findall(text)
    assert "".join(parts) == text
    assert ids(encoder, text) == encoder.tokenizer.encode(text)


def test_a_rule_cuts_real_text_into_short_parts(encoders, source_files):
    text = source_files[7].read_text()
    for name in RULED:
        parts = encoders[name].tokenizer.separable.findall(text)
        assert len(text) / len(parts) < 12, name
    assert len(set(parts)) < len(parts) / 2


UNRULED = {
    "unigram": {"model_type": "unigram"},
    "normalizer": {"normalization_rule_name": "nmt_nfkc"},
    "space in front": {"add_dummy_prefix": True},
    "fewer spaces": {"remove_extra_whitespaces": True},
    "symbols": {"user_defined_symbols": ["f(", "x y"]},
    "spaces at the end": {"treat_whitespace_as_suffix": True},
    "spaces within": {"split_by_whitespace": False},
}


@pytest.mark.parametrize("name", UNRULED)
def test_other_models_are_asked_each_time(name, source_files, tmp_path):
    encoder = encoder_of(train(source_files[:6], **UNRULED[name]), tmp_path)
    assert encoder.tokenizer.separable is None
    for text in ("def f(x y):\n    return  0", " ", "§ \u2581"):
        assert ids(encoder, text) == encoder.tokenizer.encode(text)
    assert encoder.misses == 0


def test_a_tokenizer_of_another_library_is_asked_each_time(tmp_path):
    vocabulary = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]}
    content = {"version": "1.0", "model": model, "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    encoder = CachedEncoder(load_tokenizer(tmp_path), np.dtype("<u2"))
    assert isinstance(encoder.tokenizer, HuggingFaceTokenizer)
    assert encoder.tokenizer.separable is None
    assert np.frombuffer(encoder.encode("abba"), "<u2").tolist() == [2, 1, 0]


def test_what_is_kept_is_bounded(encoders, source_files, monkeypatch):
    monkeypatch.setattr(segment_cache, "PARTS_KEPT", 50)
    encoder = CachedEncoder(encoders["ours"].tokenizer, np.dtype("<i4"))
    for path in source_files[:3]:
        text = path.read_text()
        assert ids(encoder, text) == encoder.tokenizer.encode(text)
        assert 0 < len(encoder._parts) <= 50
    long = "x" * 1000
    for _ in range(2):
        assert ids(encoder, long) == encoder.tokenizer.encode(long)
    assert long not in encoder._parts


def test_a_part_is_encoded_once(encoders):
    encoder = CachedEncoder(encoders["ours"].tokenizer, np.dtype("<i4"))
    encoder.encode("one two one two")
    assert encoder.misses == 3  # "one", " two", " one"
    encoder.encode(" two one one")
    assert encoder.misses == 3


@pytest.mark.slow
def test_all_of_the_standard_library(encoders):
    seen = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        for name in ("ours", "few characters"):
            assert ids(encoders[name], text) == encoders[name].tokenizer.encode(text), path
        seen += len(text)
    assert seen > 10_000_000


def test_a_rule_needs_no_pieces_at_all():
    """An empty vocabulary connects nothing: every run of other characters is a part."""
    trainer, normalizer = b"\x12\x02\x18\x02", b"\x1a\x04\x18\x00\x20\x00"
    assert separable_parts(trainer + normalizer) is None  # without bytes, a space might be unknown
    assert separable_parts(b"\x12\x05\x18\x02\x98\x02\x01" + normalizer).findall(" ab  c ") == [" ab", "  c", " "]


def test_the_models_differ_in_what_they_make_of_unknown_characters(encoders):
    """So that the rules are tried on each kind."""
    one_by_one, run_of_three = encoders["few characters and bytes"].tokenizer, encoders["few characters"].tokenizer
    assert one_by_one.encode("数据数") == [3 + byte for byte in "数据数".encode()]
    assert run_of_three.encode("数据数") == [0]
    assert encoders["no bytes"].tokenizer.encode("数a数") == [0, *encoders["no bytes"].tokenizer.encode("a"), 0]
