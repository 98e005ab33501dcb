"""Uptraining to a token budget: data, losses, the loop and its exact checkpoints."""
