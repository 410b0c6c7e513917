"""Whole numbers as people write them."""

import pytest

from megatron_ponder.base.whole_numbers import whole_number
from megatron_ponder.base.yaml_files import load_yaml

WHOLE = {"12": 12, "1_000": 1000, "1e12": 10**12, "2.5e9": 2_500_000_000, "-3E2": -300, "100e-2": 1, "1.e3": 1000}
WHOLE |= {"1e22": 10**22, "+7e0": 7, ".5e1": 5}


@pytest.mark.parametrize("text", WHOLE)
def test_an_exponent_may_make_a_number_whole(text):
    for read in (whole_number, load_yaml):
        assert type(read(text)) is int and read(text) == WHOLE[text]


@pytest.mark.parametrize(
    "text", ["1.5", "1.0", "1e-2", "1.25e1", "1e23", "2.160058955799473e+16", "1e400", "1e999999999", ".inf", ".nan"]
)
def test_other_numbers_are_none(text):
    with pytest.raises(ValueError, match="invalid literal"):
        whole_number(text)
    assert type(load_yaml(text)) is float or load_yaml(text) == text
