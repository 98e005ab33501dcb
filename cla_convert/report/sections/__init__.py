"""The sections of a report, one a file: each registers itself (see `report/section.py`)."""
