"""Hugging Face configuration and modeling files, and weight names both ways."""
