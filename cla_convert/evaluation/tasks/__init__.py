"""The offline task pack: lm-eval task YAMLs and the rows they read (see README.md beside this file)."""
