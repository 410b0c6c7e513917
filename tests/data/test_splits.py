import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.splits import parse_split, split_documents, split_text


def test_known_splits():
    assert split_documents(1000, "969,30,1") == {
        "train": range(969),
        "valid": range(969, 999),
        "test": range(999, 1000),
    }
    assert split_documents(100, "95,5,0") == {"train": range(95), "valid": range(95, 100)}
    assert split_documents(10, "1") == {"train": range(10)}
    assert split_documents(10, " 0, 0.5 ,0.5") == {"valid": range(5), "test": range(5, 10)}
    assert split_documents(3, "999,1") == {"train": range(3), "valid": range(3, 3)}


def test_weights_as_numbers_are_what_they_are_as_text():
    assert split_text([969, 30, 1]) == split_text([969.0, 30.0, 1.0]) == split_text("969,30,1") == "969,30,1"
    assert split_text([0.9, 0.1]) == "0.9,0.1"


def test_shares_add_up_to_one():
    assert parse_split("6,3,1") == {"train": 0.6, "valid": 0.3, "test": 0.1}


@given(
    st.integers(1, 10**9),
    st.lists(st.integers(0, 10**6) | st.floats(0, 1e6), min_size=1, max_size=3).filter(lambda w: sum(w) > 1e-6),
)
def test_splits_hold_every_document_once_in_proportion(num_documents, weights):
    ranges = split_documents(num_documents, ",".join(map(str, weights)))
    names = [name for name, weight in zip(["train", "valid", "test"], weights, strict=False) if weight > 0]
    assert list(ranges) == names
    stops = [0, *(documents.stop for documents in ranges.values())]
    assert [documents.start for documents in ranges.values()] == stops[:-1]
    assert stops[-1] == num_documents
    for name, weight in zip(["train", "valid", "test"], weights, strict=False):
        if weight > 0:
            assert abs(len(ranges[name]) - weight / sum(weights) * num_documents) <= 1.0001


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1", "1,,2", "90/10"])
def test_a_split_that_is_none(split):
    with pytest.raises(UserError, match=r"write weights of train, valid and test such as \[969, 30, 1\]"):
        parse_split(split)
