"""Floor 5: slot-by-slot generation, which is the definition of the model."""
