import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.data import segments
from megatron_ponder.data.segments import cut_segments, cuts_at_word_ends, group_chunks
from megatron_ponder.data.text_files import TextPart
from megatron_ponder.data.tokenizer import SentencePieceTokenizer, load_tokenizer


def whole(text):
    return [TextPart(text, ends_document=True)]


@settings(max_examples=300)
@given(
    text=st.text("a  \n", max_size=120),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    size=st.integers(1, 12),
    longest=st.integers(13, 40),
    may_cut=st.booleans(),
)
def test_cuts_depend_on_the_text_alone(text, cuts, size, longest, may_cut):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [TextPart(text[a:b], False) for a, b in itertools.pairwise(bounds)]
    parts[-1] = parts[-1]._replace(ends_document=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segments, "SEGMENT_CHARACTERS", size)
        patched.setattr(segments, "LONGEST_SEGMENT", longest)
        found = list(cut_segments(parts, may_cut))
        assert found == list(cut_segments(whole(text), may_cut))
        assert list(cut_segments([*parts, *parts], may_cut)) == found * 2
    assert "".join(segment.text for segment in found) == text
    assert [segment.ends_document for segment in found] == [False] * (len(found) - 1) + [True]
    assert max(len(segment.text) for segment in found) <= longest + 2


def test_only_ends_of_words_are_cut_where_there_are_some():
    text = "word " * segments.SEGMENT_CHARACTERS
    found = list(cut_segments(whole(text), may_cut=True))
    assert "".join(segment.text for segment in found) == text
    assert all(segment.text.startswith(" word") and segment.text.endswith("word") for segment in found[1:-1])
    assert max(len(segment.text) for segment in found) < segments.SEGMENT_CHARACTERS + 10
    assert list(cut_segments(whole(text), may_cut=False)) == whole(text)


def test_text_without_an_end_of_a_word_is_cut_after_a_line_or_anywhere(monkeypatch):
    monkeypatch.setattr(segments, "LONGEST_SEGMENT", 100)
    for may_cut in (False, True):
        found = [len(segment.text) for segment in cut_segments(whole("x" * 50 + "\n" + "x" * 250), may_cut)]
        assert found == [51, 100, 100, 50]
    assert [len(segment.text) for segment in cut_segments(whole("x" * 60 + " " + "x" * 60), False)] == [60, 61]


def test_a_tokenizer_that_cannot_be_cut(tokenizer_path):
    class WithLeadingSpace(SentencePieceTokenizer):
        def encode(self, text):
            return super().encode(" " + text)

    assert cuts_at_word_ends(load_tokenizer(tokenizer_path))
    assert not cuts_at_word_ends(WithLeadingSpace(tokenizer_path))


def test_chunks_hold_segments_in_order(monkeypatch):
    monkeypatch.setattr(segments, "CHUNK_CHARACTERS", 10)
    given = [TextPart("x" * size, True) for size in (3, 3, 3, 3, 25, 1)]
    chunks = list(group_chunks(given))
    assert [len(chunk) for chunk in chunks] == [4, 1, 1]
    assert [segment for chunk in chunks for segment in chunk] == given
