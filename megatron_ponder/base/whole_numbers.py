"""Whole numbers as people write them, in files and on command lines: 50000, 50_000, 5e4 and 2.5e9."""

import re
from decimal import Decimal

LONGEST_NUMBER = 40  # characters; 64 bits have 20 digits
_WITH_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,3}")


def whole_number(text: str) -> int:
    """The whole number that a text is, in decimal digits or with an exponent.

    Raises:
        ValueError: it is none, or too long for any use.
    """
    if len(text) <= LONGEST_NUMBER and _WITH_EXPONENT.fullmatch(text):
        number = Decimal(text)
        if number == number.to_integral_value() and abs(number) < Decimal(f"1e{LONGEST_NUMBER - 1}"):
            return int(number)
    return int(text)
