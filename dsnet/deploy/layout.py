"""Names of files in a bundle's folder. Needs no torch."""

MANIFEST = "bundle.json"
"""The file that describes the bundle."""
