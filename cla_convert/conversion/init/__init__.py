"""Initialisations: each module registers its own (see `conversion/initialisation.py`). They import no torch."""
