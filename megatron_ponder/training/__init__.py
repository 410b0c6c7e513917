"""Floor 5: the training loop and everything it stands on."""
