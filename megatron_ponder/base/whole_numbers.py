"""Whole numbers as people write them, in files and on command lines: 50000, 50_000, 5e4 and 2.5e9."""

import re
from decimal import Decimal

LONGEST_NUMBER = 40  # characters; 64 bits have 20 digits
_WITH_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,3}")


def whole_number(text: str) -> int:
    """The whole number that a text is, in decimal digits or with an exponent.

    With an exponent it is also exactly the fp64 number of the text, so that either may be taken for the other.

    Raises:
        ValueError: it is none.
    """
    if len(text) <= LONGEST_NUMBER and _WITH_EXPONENT.fullmatch(text):
        number = Decimal(text)
        if number == float(text) and number == number.to_integral_value():
            return int(number)
    return int(text)
