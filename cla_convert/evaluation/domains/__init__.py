"""Seven kinds of text that every run is measured on (pack.py), and which of them it touched (overlap.py); README.md."""
