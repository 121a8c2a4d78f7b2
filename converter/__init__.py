"""Checkpoints in, served weights out: the formats, families and the engine of ftconvert."""
