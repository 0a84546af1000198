"""Speed and memory, measured: `python -m benchmarks` lists them, `python -m benchmarks.NAME
[--quick] [--json FILE]` runs one.

A benchmark is one module of this folder with a description in `BENCHMARK`; there is no list to
edit. Ratios of things that ran side by side are what to compare; milliseconds belong to one machine
and one hour. None of them can fail on a slow machine.
"""

from dsnet.arithmetic import fix_arithmetic

fix_arithmetic()  # before any of them multiplies
