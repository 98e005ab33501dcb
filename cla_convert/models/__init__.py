"""Checkpoints in and out, and the CLA modelling code that travels with every output."""
