"""What datasets say of themselves, and datasets that become one."""

import pytest


def test_merge_and_inspect(ponder, corpus, tmp_path):
    merged = ponder("merge", "--input", corpus.dataset, corpus.dataset, "--output-prefix", tmp_path / "both")
    assert (merged.code, merged.err) == (0, "")
    assert merged.out.startswith(f"{tmp_path / 'both'}: 60 documents, ")
    shown = ponder("inspect-dataset", tmp_path / "both", "--tokenizer", corpus.tokenizer, "--samples", 60, "--verify")
    assert (shown.code, shown.err) == (0, "")
    assert "version 1, tokens of type uint16" in shown.out
    assert "60 sequences, 60 documents, " in shown.out
    assert "vocabulary 512, end token 2" in shown.out
    first = corpus.text.read_text()[:20].split("\n")[0]
    assert f"tokens: {first}" in shown.out
    assert "checksums: .bin and .idx are the files that the manifest describes" in shown.out
    ids = ponder("inspect-dataset", tmp_path / "both", "--samples", 1, "--sample-tokens", 4)
    assert len(ids.out.splitlines()[-1].partition("tokens: ")[2].split()) == 5


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("inspect-dataset", ["nowhere"], "error: nowhere.bin does not exist"),
        ("inspect-dataset", ["nowhere", "--samples", "-1"], "error: argument --samples: samples is -1; its range is 0"),
        ("merge", ["--input", "nowhere", "--output-prefix", "out"], "error: nowhere.bin does not exist"),
    ],
)
def test_mistakes_get_one_line(ponder, command, arguments, message):
    result = ponder(command, *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(message)
