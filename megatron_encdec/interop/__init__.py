"""Interop: checkpoints out to stock Hugging Face models, and the name tables that work both ways."""
