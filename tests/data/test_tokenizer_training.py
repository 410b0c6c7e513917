import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.data.tokenizer_training import train_tokenizer


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_training_is_deterministic_and_leaves_two_files(source_files, tmp_path):
    for name in ("first", "second"):
        train_tokenizer(source_files, tmp_path / name / "t.v1", vocab_size=600, sample_bytes=50_000)
    first = files(tmp_path / "first")
    assert sorted(first) == ["t.v1.model", "t.v1.vocab"]
    assert first == files(tmp_path / "second")
    vocabulary = first["t.v1.vocab"].decode().split("\n")
    assert len(vocabulary) > 600
    assert vocabulary[:4] == ["<unk>\t0", "<s>\t0", "</s>\t0", "<0x00>\t0"]


def test_the_seed_draws_the_sample(source_files, tmp_path):
    models = [
        train_tokenizer(source_files, tmp_path / str(seed), 600, sample_bytes=50_000, seed=seed).fingerprint
        for seed in (0, 1)
    ]
    assert models[0] != models[1]


def test_source_code_compresses(tokenizer_path, source_files):
    tokenizer = load_tokenizer(tokenizer_path)
    text = source_files[3].read_text()
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2.8
    assert len(tokenizer.encode("\n" + " " * 16)) <= 2


def test_awkward_text_is_trained_on(tmp_path):
    line = "\tthe quick brown fox \u2581 jumps \u2585 over \0 the lazy dog\n"
    (tmp_path / "a.txt").write_text(line * 20 + "x" * 50_000 + "\n")
    tokenizer = train_tokenizer([tmp_path], tmp_path / "t", vocab_size=330)
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert len(tokenizer.encode("the quick brown fox")) < 10


def test_too_many_tokens_for_the_text(source_files, tmp_path):
    (tmp_path / "a.txt").write_text(source_files[0].read_text()[:2000])
    with pytest.raises(UserError, match=r"at most (\d+) tokens, not 50000; set --vocab-size") as caught:
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "t", vocab_size=50_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer([tmp_path / "a.txt"], tmp_path / "t", vocab_size=largest).vocab_size == largest


def test_too_few_tokens_for_the_text(source_files, tmp_path):
    with pytest.raises(UserError, match=r"too few for the text; set --vocab-size to at least (\d+)") as caught:
        train_tokenizer(source_files[:1], tmp_path / "t", vocab_size=270)
    smallest = int(str(caught.value).split("at least ")[1])
    assert train_tokenizer(source_files[:1], tmp_path / "t", vocab_size=smallest).vocab_size == smallest


@pytest.mark.parametrize("vocab_size", [-5, 0, 1, 259])
def test_too_few_tokens_for_any_text(source_files, tmp_path, vocab_size):
    with pytest.raises(UserError, match=rf"--vocab-size is {vocab_size}; set it above 259"):
        train_tokenizer(source_files[:1], tmp_path / "t", vocab_size=vocab_size)


def test_text_without_anything_to_learn(tmp_path):
    (tmp_path / "a.txt").write_text("\t\t\t")
    with pytest.raises(UserError, match="more or other text"):
        train_tokenizer([tmp_path / "a.txt"], tmp_path / "t", vocab_size=300)
