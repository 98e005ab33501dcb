"""`python -m cla_convert.cli`."""

from . import main

main()
