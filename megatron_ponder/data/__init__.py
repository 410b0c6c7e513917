"""Corpora, indexed datasets, sample order and tokenizers."""
