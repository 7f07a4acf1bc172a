"""The run directory: atomic files, metrics log, lock, lineage. Pure Python, no torch."""
