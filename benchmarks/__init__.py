"""Benchmarks: `python -m benchmarks` lists them, `python -m benchmarks.NAME [--quick] [--json
FILE]` runs one.

A benchmark is a module of this folder with a description in `BENCHMARK`; there is no list to edit.
Compare ratios of calls that ran side by side; milliseconds hold only for one machine at one time.
No benchmark can fail because a machine is slow.
"""

from dsnet.arithmetic import fix_arithmetic

fix_arithmetic()  # before a benchmark computes anything
