import json
import re

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

# Characters that tokenizers treat in their own way, more often than chance would have them.
SPECIAL = [" ", "  ", "\n", "\r\n", "\t", "\0", "\u2581", "\u2585", "\u2047", "\ufeff", "\ufffd", "\u2028", "e\u0301"]
LIKE_SPECIAL_TOKENS = ["<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>"]
WORDS = ["def f(x):\n    return x", "naïve", "数据", "🙂"]
TEXT = st.text() | st.lists(st.sampled_from(SPECIAL + LIKE_SPECIAL_TOKENS + WORDS)).map("".join)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def hugging_face_folder(source_files, tmp_path_factory):
    """A byte-level tokenizer as GPT-2 has."""
    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train([str(path) for path in source_files[:5]], 1000, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def byte_level_tokenizer(hugging_face_folder):
    return load_tokenizer(hugging_face_folder)


@settings(max_examples=300)
@given(TEXT)
@example(" leading, trailing ")
@example("\n\n    \n")
def test_sentencepiece_gives_back_any_text(sentencepiece_tokenizer, text):
    ids = sentencepiece_tokenizer.encode(text)
    assert sentencepiece_tokenizer.decode(ids) == text
    assert all(3 <= token < sentencepiece_tokenizer.vocab_size for token in ids)


@settings(max_examples=300)
@given(TEXT)
def test_hugging_face_gives_back_any_text(byte_level_tokenizer, text):
    ids = byte_level_tokenizer.encode(text)
    assert byte_level_tokenizer.decode(ids) == text
    assert all(token != byte_level_tokenizer.eod_id and token < byte_level_tokenizer.vocab_size for token in ids)


def test_sentencepiece_attributes(tokenizer_path):
    tokenizer = load_tokenizer(str(tokenizer_path))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.path == tokenizer_path
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (2048, 1, 2)
    assert len(tokenizer.fingerprint) == 64
    assert load_tokenizer(tokenizer_path.parent).fingerprint == tokenizer.fingerprint


def test_pieces_are_printable_and_tell_tokens_apart(sentencepiece_tokenizer, byte_level_tokenizer):
    for tokenizer in (sentencepiece_tokenizer, byte_level_tokenizer):
        pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
        assert all(piece.isprintable() and piece for piece in pieces)
        assert len(set(pieces)) > 0.85 * len(pieces)
        shown = "".join(tokenizer.piece(token) for token in tokenizer.encode("a \tdef f():\n"))
        assert shown == "a\u2581\\tdef\u2581f():\\n"


def test_ids_without_a_piece_have_a_name_in_their_place(sentencepiece_tokenizer, byte_level_tokenizer):
    """Vocabularies of models may be larger than the tokenizer's."""
    for tokenizer in (sentencepiece_tokenizer, byte_level_tokenizer):
        ids, size = tokenizer.encode("def naïve ☕"), tokenizer.vocab_size
        for token in (size, 50300, 2**31, -1):
            assert tokenizer.piece(token) == f"<id {token}>"
            assert tokenizer.decode([token]) == f"<id {token}>"
        for at in range(1, len(ids)):
            before, after = tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:])
            shown = tokenizer.decode([*ids[:at], size, *ids[at:], size])
            assert shown == f"{before}<id {size}>{after}<id {size}>"


def test_gaps_in_a_vocabulary_have_names_too(hugging_face_folder, tmp_path):
    content = json.loads((hugging_face_folder / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"].values())
    content["model"]["vocab"] |= {name: at + 7 for name, at in content["model"]["vocab"].items() if at == last}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == last + 8
    assert tokenizer.piece(last) == tokenizer.decode([last]) == f"<id {last}>"
    assert tokenizer.piece(last + 7) != f"<id {last + 7}>"


def test_hugging_face_end_token_from_the_config(hugging_face_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((hugging_face_folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    for named in ("!", {"content": "!"}, ["no such token", "!"], [{"content": "!"}]):
        config.write_text(json.dumps({"eos_token": named, "bos_token": named}))
        tokenizer = load_tokenizer(tmp_path)
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert tokenizer.eod_id == tokenizer.bos_id == tokenizer.encode("!")[0]
    absent = "names no such token as eos_token, which tokenizer.json does not have; name a token that it has"
    for named, said in [
        ("no such token", absent),
        (["no such token"], absent),
        (3, 'has 3 as eos_token; name a token there, such as "</s>"'),
        ({"id": 2}, "as eos_token; name a token there"),
        ([None], "has [null] as eos_token; name a token there"),
    ]:
        config.write_text(json.dumps({"eos_token": named}))
        with pytest.raises(UserError, match=re.escape(said)):
            load_tokenizer(tmp_path)
    config.write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        load_tokenizer(tmp_path)
    config.unlink()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.eod_id, tokenizer.bos_id) == (0, None)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"no tokenizer", b"\xff\xfe{}"])
def test_a_file_that_is_no_tokenizer(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not a "):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; .*ponder train-tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
