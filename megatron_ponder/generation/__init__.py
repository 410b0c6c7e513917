"""Slot-by-slot generation, which is the definition of the model: scheduler, cache, sampling."""
