"""Names of stored supernets, without an ending. Needs no torch."""

FINAL = "final"
STRUCTURE = "structure"
"""Name of the checkpoint that a structure search leaves in its folder."""
