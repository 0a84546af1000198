"""`python -m dsnet.training`: train, measure and tabulate a supernet with torch alone, in calls of
limited duration.

Exit codes: 0 everything is done; 6 more is to be done, repeat the command (also after SIGTERM, and
when a disk that was full has room again); 130 Ctrl-C; others as in `dsnet.errors`. Progress is
written to stderr, and one line of JSON to stdout at the end.
"""

from __future__ import annotations

from dsnet.import_path import protect_imports

protect_imports()  # before all imports that a module in the working directory could shadow

# ruff: noqa: E402
import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dsnet.arithmetic import fix_arithmetic
from dsnet.disk_room import DEFAULT_RESERVE_MIB, DiskReserve
from dsnet.errors import ConfigError, DsnetError, PreflightError, StoppedError, StorageError, StorageStoppedError
from dsnet.settings import Device
from dsnet.stop_signals import StopRequest, stop_on_signals
from dsnet.storage_faults import storage_error

RESERVE = (0.1, 15.0)
"""Part of --max-seconds reserved for stopping cleanly: a share of it, and at most so many
seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    fix_arithmetic()
    begun = time.monotonic()
    options = _parser().parse_args(arguments)
    deadline = begun + options.max_seconds - min(RESERVE[0] * options.max_seconds, RESERVE[1])
    try:
        with stop_on_signals(lambda: time.monotonic() > deadline, lambda name: _say(f"{name}: stopping")) as stop:
            return _run(options, stop)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        told = storage_error(error, near=options.out) or error
        if not isinstance(told, DsnetError):
            raise
        _say(f"error: {told}")
        if isinstance(told, StorageError) and os.path.exists(options.out / "manifest.json"):
            _say("finished work is kept; when that is corrected, repeat the command")
            return StorageStoppedError.exit_code
        return told.exit_code


def _run(options: argparse.Namespace, stop: StopRequest) -> int:
    if not options.max_seconds > 0:  # NaN is not above 0 either
        raise ConfigError(f"--max-seconds is {options.max_seconds:g}, but must be above 0")
    if options.min_free_mib < 0:
        raise ConfigError(f"--min-free-mib is {options.min_free_mib}, but must be 0 or more")
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, but must be at least 1")
    import torch  # imported late, so that --help is fast

    from dsnet.standalone.output_folder import OutputFolder
    from dsnet.standalone.resolved import read_config
    from dsnet.standalone.stages import run_standalone

    torch.set_num_threads(options.threads)
    reserve = DiskReserve(options.out, options.min_free_mib, "--min-free-mib")
    if (problem := reserve.problem()) is not None:
        raise PreflightError(problem)
    stop.add(lambda: reserve.problem() is not None)
    folder = OutputFolder(options.out)
    before = folder.footprint()
    try:
        run_standalone(read_config(options.config), options.out, device=options.device, should_stop=stop, say=_say)
    except StoppedError as stopped:
        if (problem := reserve.problem()) is not None:
            raise StorageStoppedError(problem) from stopped
        if stop.signal is None and folder.footprint() == before:
            raise ConfigError(
                f"nothing could be finished within --max-seconds {options.max_seconds:g}: raise it, or lower "
                "supernet.recalibration.images or measure.repeats"
            ) from stopped
        _report(folder, "stopped")
        return stop.exit_code
    _report(folder, "done")
    return 0


def _report(folder: Any, status: str) -> None:
    """Write the line of JSON to stdout."""
    stages = {name: entry["status"] for name, entry in folder.manifest().get("stages", {}).items()}
    seconds = sum(entry["seconds"] for entry in folder.manifest().get("stages", {}).values())
    line = {"status": status, "out": str(folder.path), "stages": stages, "seconds": round(seconds, 1)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsnet.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, required=True, help="resolved.json (see dsnet.standalone.resolved)")
    parser.add_argument("--out", type=Path, required=True, help="output folder; one that exists is continued")
    parser.add_argument("--device", choices=get_args(Device), default="auto", help="default: auto")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="torch threads; default: all cores")
    parser.add_argument(
        "--max-seconds", type=float, default=540.0, help="stop cleanly before so many seconds; default: 540"
    )
    parser.add_argument(
        "--min-free-mib",
        type=int,
        default=DEFAULT_RESERVE_MIB,
        help=f"do not begin, and stop, with fewer MiB free at --out; default: {DEFAULT_RESERVE_MIB}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
