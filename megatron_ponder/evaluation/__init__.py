"""Losses, executed steps and plots of trained models."""
