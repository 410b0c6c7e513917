"""Pretraining, evaluation and serving of PonderLM-3: language models whose tokens think before they speak."""

__version__ = "0.1.0"
