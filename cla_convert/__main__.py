"""`python -m cla_convert`."""

from .cli import main

main()
