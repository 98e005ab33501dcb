"""Sharing patterns: each module registers its own (see `conversion/pattern.py`). They import no torch."""
