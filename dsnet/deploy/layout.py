"""Names of files in a bundle's folder, and of the precisions in which it runs. Needs no torch."""

MANIFEST = "bundle.json"
"""The file that describes the bundle."""
FLOAT32, INT8 = "float32", "int8"
"""Precisions: that of training, and that of quantised graphs (`dsnet.deploy.precisions`)."""
ORIGIN_CLAIM = "made_from"
"""The claim that says from which results of a run a bundle was made."""
