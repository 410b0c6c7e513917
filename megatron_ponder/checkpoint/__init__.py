"""Checkpoints on disk, which belong to no layout, and models loaded from them."""
