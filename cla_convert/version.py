"""The version, apart from the package's root, whose names lie above everything else."""

__version__ = "0.2.0"
