"""Sweeps: configuration, stages, Ray, MLflow, run folder, bundles and the command line."""

import os
import sys

# Before any other of our imports: `python -m orchestration.cli` may run in a folder that has a
# `dsnet.py` of its own.
sys.path.insert(0, _root := os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
try:
    from dsnet.import_path import protect_imports
finally:
    sys.path.remove(_root)

protect_imports()
