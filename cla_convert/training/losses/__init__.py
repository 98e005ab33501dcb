"""Losses: each module registers its own (see `training/train_loss.py`). They import no torch at the top."""
