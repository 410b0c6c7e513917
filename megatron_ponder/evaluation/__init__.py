"""Losses and executed steps of trained models, where steps help, figures, public tasks."""
