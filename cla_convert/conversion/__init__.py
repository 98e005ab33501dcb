"""What the shared projections start from: sharing maps, plans, pooling, calibration, streaming execution."""
