"""Modelling code that ships with every output, written by `python -m cla_convert.models.generate`."""
