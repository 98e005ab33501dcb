"""The stages of a run, one function each: from a recipe and a run folder to a typed result.

`run` does them in order, the single verbs one at a time, and Python calls them as it likes (docs/python-api.md).
"""
