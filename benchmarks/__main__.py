"""`python -m benchmarks`: every benchmark and what it measures, one line each."""

from __future__ import annotations

from benchmarks.harness import find_benchmarks


def main() -> None:
    """List the benchmarks."""
    found = find_benchmarks()
    width = max(map(len, found))
    for name, description in found.items():
        print(f"{name:{width}}  {description}")


if __name__ == "__main__":
    main()
