"""Floor 4: corpora, indexed datasets, sample order and tokenizers."""
