"""Tests, in folders that mirror the package."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
