"""Floor 5: losses, executed steps and plots of trained models."""
