"""Hugging Face: import, export, and the files that travel with an export."""
