"""Corpora, tokenizers, indexed datasets, the order of samples, and the loader."""
