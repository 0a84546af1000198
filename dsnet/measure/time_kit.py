"""Time the ONNX graphs of a kit on this device.

This file is copied into every kit (`dsnet.measure.kit`) and runs where dsnet-orch cannot: it needs
Python 3.8 or newer, numpy and onnxruntime, and nothing else. Start it in the folder of the kit:

    python time_kit.py [--threads 1] [--rounds 15] [--minutes 30] [--out result.json]

It compares every file of the kit with its SHA-256 and the outputs of every graph with the stored
ones, then times all graphs with all numbers of images, interleaved: each round runs all of them
once in a new random order. Ctrl-C stops it; the rounds that are finished are written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Python 3.8 cannot make these types
    Call = tuple[str, int]
    """Name of a graph and number of images."""
    Times = dict[str, dict[str, list[float]]]
    """Graph -> number of images -> milliseconds in each round."""

KIT_VERSION = 1
"""Version of the kit that this script reads, and of the result that it writes."""
MIN_ROUNDS = 3
"""Number of rounds that are timed in any case: fewer have no spread."""
DESCRIPTION = "kit.json"


class KitError(Exception):
    """The kit cannot be run; the message says what to do."""


def say(text: str) -> None:
    """Print a line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def sha256(path: str) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_kit(folder: str) -> dict[str, Any]:
    """The description of the kit, whose files are compared with their hashes.

    Raises:
        KitError: the kit is incomplete, changed, or of another version.
    """
    path = os.path.join(folder, DESCRIPTION)
    try:
        with open(path, encoding="utf-8") as file:
            kit = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise KitError(f"{path} cannot be read ({error}); copy the whole kit again") from error
    if not isinstance(kit, dict) or kit.get("version") != KIT_VERSION:
        raise KitError(f"{path} is not of version {KIT_VERSION}; export the kit again")
    for name, expected in kit["files"].items():
        own = os.path.join(folder, name)
        if not os.path.isfile(own) or sha256(own) != expected:
            raise KitError(f"{own} is missing, or is not the file that was exported; copy the whole kit again")
    return kit


def open_graphs(folder: str, kit: dict[str, Any], threads: int) -> dict[str, Any]:
    """A session for every graph, by name.

    Raises:
        KitError: this version of onnxruntime cannot read a graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    sessions = {}
    for graph in kit["graphs"]:
        path = os.path.join(folder, graph["file"])
        try:
            sessions[graph["name"]] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise KitError(
                f"{path}: onnxruntime {onnxruntime.__version__} cannot read this graph ({error}); "
                f"it needs ONNX opset {kit['opset']}, so install a newer onnxruntime"
            ) from error
    return sessions


def deviations(folder: str, kit: dict[str, Any], sessions: dict[str, Any]) -> dict[str, float]:
    """For each graph the largest difference of an output from the stored one, relative to the
    largest stored value of this output."""
    import numpy as np

    found = {}
    with np.load(os.path.join(folder, kit["examples"])) as examples:
        for graph in kit["graphs"]:
            outputs = sessions[graph["name"]].run(graph["outputs"], {graph["input"]: examples[graph["example_input"]]})
            worst = 0.0
            for output, name in zip(outputs, graph["example_outputs"]):
                stored = examples[name]
                scale = float(np.abs(stored).max()) or 1.0
                difference = float(np.abs(output - stored).max()) / scale
                # A NaN is no small difference.
                worst = max(worst, difference) if difference == difference else float("inf")
            found[graph["name"]] = min(worst, 1e9)  # JSON has no infinity
    return found


def say_deviations(found: dict[str, float], tolerance: float) -> None:
    """Print whether the outputs of all graphs are the stored ones."""
    wrong = {name: deviation for name, deviation in found.items() if deviation > tolerance}
    for name, deviation in wrong.items():
        say(f"warning: outputs of {name} are off by {deviation:.2g} of the largest, so the result cannot be imported")
    if not wrong:
        say(f"outputs of {len(found)} graphs are the stored ones, up to {max(found.values()):.2g} of the largest")


def make_calls(kit: dict[str, Any], sessions: dict[str, Any]) -> dict[Call, Callable[[], object]]:
    """Every graph with every number of images, on random images that all of them share."""
    import numpy as np

    largest = max(size for graph in kit["graphs"] for size in graph["sizes"])
    images = np.random.RandomState(kit["seed"]).standard_normal((largest, *kit["shape"])).astype(np.float32)
    inputs = {"images": images}
    trunk = next(graph for graph in kit["graphs"] if graph["name"] == "trunk")
    features = sessions["trunk"].run(trunk["outputs"][:1], {trunk["input"]: images[: max(trunk["sizes"])]})
    inputs["features"] = np.ascontiguousarray(features[0])

    def call(graph: dict[str, Any], size: int) -> Callable[[], object]:
        session, outputs = sessions[graph["name"]], graph["outputs"]
        feed = {graph["input"]: inputs[graph["feed"]][:size]}
        return lambda: session.run(outputs, feed)

    return {(graph["name"], size): call(graph, size) for graph in kit["graphs"] for size in graph["sizes"]}


def run_rounds(
    calls: dict[Call, Callable[[], object]],
    rounds: int,
    warmup: int,
    seconds: float,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[Call, float]]:
    """Yield the milliseconds of every call for each round that is timed.

    Args:
        calls: the calls by graph and number of images.
        rounds: number of timed rounds.
        warmup: number of rounds before these. After the first one, another starts only within a
            quarter of the time.
        seconds: time after which no further round starts; `MIN_ROUNDS` are timed in any case.
        seed: seed of the random orders.
        clock: returns seconds.
    """
    order = sorted(calls)
    shuffle = random.Random(seed)
    begin = clock()
    for number in range(warmup + rounds):
        is_warmup = number < warmup
        is_late = clock() - begin > (seconds / 4 if is_warmup else seconds)
        if is_late and is_warmup and number:
            continue
        if is_late and number >= warmup + MIN_ROUNDS:
            return
        shuffle.shuffle(order)
        times = {}
        for name in order:
            start = clock()
            calls[name]()
            times[name] = (clock() - start) * 1e3
        if not is_warmup:
            yield times


def read_text(path: str) -> str:
    """The text of a file; empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def cpu_name() -> str:
    """The model of the board or the processor, as far as the system tells it."""
    board = read_text("/proc/device-tree/model").strip("\0 \n")
    if board:
        return board
    facts = [line.partition(":") for line in read_text("/proc/cpuinfo").splitlines()]
    for wanted in ("model name", "Hardware", "Model", "cpu model"):
        for key, _, value in facts:
            if key.strip() == wanted and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_device() -> dict[str, Any]:
    """Facts about this device and what runs on it."""
    import numpy as np
    import onnxruntime

    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "machine": platform.machine(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def check_writable(path: str) -> None:
    """Raise before anything is timed if the result cannot be written.

    Raises:
        KitError: its folder is missing or cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):
        raise KitError(f"{folder} cannot be written; choose another file with --out")


def write_json(path: str, value: dict[str, Any]) -> None:
    """Replace a file by JSON, never by half of it.

    Raises:
        KitError: it cannot be written.
    """
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise KitError(f"{path} cannot be written ({error}); make room, or choose another file with --out") from error


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Time the ONNX graphs of this kit, and write the result as JSON.")
    parser.add_argument("--threads", type=int, default=1, help="threads of a call (default: 1)")
    parser.add_argument("--rounds", type=int, help="number of timed rounds (default: as the kit says)")
    parser.add_argument("--minutes", type=float, default=30.0, help="time after which no round starts (default: 30)")
    parser.add_argument("--out", default="result.json", help="file of the result (default: result.json)")
    options = parser.parse_args(arguments)
    if options.threads < 1 or (options.rounds is not None and options.rounds < 1) or not options.minutes > 0:
        parser.error("--threads and --rounds must be at least 1, and --minutes above 0")
    return options


def time_all(options: argparse.Namespace, kit: dict[str, Any], sessions: dict[str, Any], times: Times) -> None:
    """Run the rounds, and add the times of each finished round to `times`."""
    calls = make_calls(kit, sessions)
    rounds = kit["rounds"] if options.rounds is None else options.rounds
    say("{} calls a round: {} rounds of warm-up, then {} timed rounds".format(len(calls), kit["warmup"], rounds))
    begin = time.monotonic()
    timed = run_rounds(calls, rounds, kit["warmup"], 60 * options.minutes, kit["seed"])
    for number, row in enumerate(timed, 1):
        for (graph, size), ms in row.items():
            times[graph].setdefault(str(size), []).append(ms)
        passed = time.monotonic() - begin
        left = passed / (number + kit["warmup"]) * (rounds - number)
        say(f"round {number} of {rounds}, at most {left:.0f} s left")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kit in the folder of this file; returns the exit code."""
    options = parse_arguments(arguments)
    folder = os.path.dirname(os.path.abspath(__file__))
    times: Times = {}
    result: dict[str, Any] = {"version": KIT_VERSION, "threads": options.threads, "timings": times}
    is_stopped = False
    try:
        check_writable(options.out)
        kit = read_kit(folder)
        result["kit_sha256"] = sha256(os.path.join(folder, DESCRIPTION))
        result["device"] = describe_device()
        sessions = open_graphs(folder, kit, options.threads)
        result["tolerance"] = kit["tolerance"]
        result["deviations"] = deviations(folder, kit, sessions)
        say_deviations(result["deviations"], kit["tolerance"])
        times.update({graph["name"]: {} for graph in kit["graphs"]})
        time_all(options, kit, sessions, times)
    except KitError as error:
        say(f"error: {error}")
        return 1
    except ImportError as error:
        say(f"error: {error}; this script needs numpy and onnxruntime: pip install numpy onnxruntime")
        return 1
    except KeyboardInterrupt:
        is_stopped = True
    num_rounds = min([len(row) for sizes in times.values() for row in sizes.values()] or [0])
    if num_rounds == 0:
        say("stopped before a round was finished; nothing is written")
        return 130
    result["load_average"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    try:
        write_json(options.out, result)
    except KitError as error:
        say(f"error: {error}")
        return 1
    say("{}: {} rounds{}".format(options.out, num_rounds, ", then stopped" if is_stopped else ""))
    if num_rounds < MIN_ROUNDS:
        say(f"warning: that is fewer than {MIN_ROUNDS}, so it cannot be imported; run the script again")
    return 130 if is_stopped else 0


if __name__ == "__main__":
    sys.exit(main())
