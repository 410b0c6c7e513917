"""Floor 4: checkpoints on disk, which belong to no layout, and models loaded from them."""
