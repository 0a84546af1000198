"""Load test of `dsnet-orch serve` on the loopback interface: throughput and latency of a gate
beside those of the static widest sub-network in the same server, and of the gate while a replica is
killed.

The network has random weights, and its gate spreads the images evenly over its routes. Clients send
one image each, wait for its answer and send the next one; they are threads of this process and
share the machine with the server. Both contenders are asked in turn, in each round.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
import torch

from benchmarks.dynamic_inference import WIDE_LIST, Network, spread_gate
from benchmarks.harness import Headline, Options, Report, Samples, Section, run_benchmark
from dsnet.data.normalization import Normalization
from dsnet.deploy.bundle import BundleContents, save_bundle
from dsnet.deploy.engines import TORCH
from dsnet.deploy.onnx_files import FOLDER as ONNX
from dsnet.deploy.operating_points import OperatingPoint
from dsnet.families import Task, create
from dsnet.network.batchnorm import recalibrate
from dsnet.routers.base import Evidence
from dsnet.routers.fixed import FixedRouter
from orchestration.pipeline.export import write_formats
from orchestration.serving.command import serving
from orchestration.serving.settings import ServeSettings

BENCHMARK = "HTTP server: time of a request with a gate over that with the static widest sub-network (goal: at most 1)"
GOAL = 1.0
GATE, WIDEST = "gate", "widest"
IMAGE_SIZE = 32
NUM_IMAGES = 256
NORMALIZATION = Normalization((127.5,) * 3, (127.5,) * 3)
NUM_REPLICAS = 2
KILLED_AFTER = 1 / 3
"""Share of the time of the last load after which a replica is killed."""
PARAMS = (
    click.Option(
        ["--engine"],
        type=click.Choice([TORCH, "onnxruntime"]),
        default="onnxruntime",
        show_default=True,
        help="What runs the network of both contenders.",
    ),
    click.Option(["--clients"], type=click.IntRange(1), default=16, show_default=True, help="Requests at a time."),
    click.Option(["--seconds"], type=click.FloatRange(1), default=10.0, show_default=True, help="Length of one load."),
)


@dataclass(frozen=True)
class Load:
    """Requests of all clients in one load."""

    seconds: float
    """From the first request to the last answer."""
    finished_s: np.ndarray
    """When each was answered, from the start."""
    ms: np.ndarray
    """Latency of each, as the client sees it."""
    statuses: Counter[int]
    """Number of answers by status; 0: the connection broke."""

    @property
    def per_second(self) -> float:
        """Requests that were answered with predictions in a second."""
        return self.statuses[200] / self.seconds

    def row(self, title: str) -> tuple[str, ...]:
        """A line of the table."""
        quantiles = np.percentile(self.ms, [50, 95, 99])
        failed = sum(self.statuses.values()) - self.statuses[200]
        return (title, f"{self.per_second:.1f}", *(f"{value:.1f}" for value in quantiles), str(failed))

    def figures(self) -> dict[str, Any]:
        """For the JSON file."""
        p50, p95, p99 = np.percentile(self.ms, [50, 95, 99]).tolist()
        counted = {str(status): number for status, number in sorted(self.statuses.items())}
        return {"per_second": self.per_second, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "statuses": counted}


def joined(loads: Sequence[Load]) -> Load:
    """Several loads as one."""
    return Load(
        sum(load.seconds for load in loads),
        np.concatenate([load.finished_s for load in loads]),
        np.concatenate([load.ms for load in loads]),
        sum((load.statuses for load in loads), Counter()),
    )


def save_network(folder: Path, network: Network, seed: int, engine: str = TORCH) -> list[bytes]:
    """Write a bundle with the operating points `gate` and `widest` for an engine; returns bodies of
    requests, one image each."""
    supernet = create(network.family, Task(10, 3, IMAGE_SIZE), dict(network.options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (NUM_IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)
    images = NORMALIZATION.apply(pixels)
    recalibrate(supernet, [images])
    supernet.eval()
    with torch.no_grad():
        hidden = supernet.trunk(images, supernet.subnets[0]).hidden
    gate = spread_gate(hidden, network.routes)
    counts = torch.bincount(gate.step(Evidence({"hidden": hidden}, len(hidden)), ()))
    assert int(counts.min()) > 0
    contents = BundleContents(
        supernet=supernet,
        router=gate,
        normalization=NORMALIZATION,
        class_names=[str(label) for label in range(10)],
        examples=pixels[:16],
        point_name=GATE,
        further_points=[OperatingPoint(WIDEST, FixedRouter(network.routes[-1]), {})],
    )
    save_bundle(folder, contents, claims={}, gate_yaml="a gate with random weights\n")
    if engine != TORCH:
        write_formats(folder, [ONNX])
    raw = (base64.b64encode(image.numpy().tobytes()).decode() for image in pixels)
    return [json.dumps({"pixels": text}).encode() for text in raw]


def run_load(url: str, point: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Ask for so long with so many clients at a time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        asked = [
            threads.submit(_client, url, point, bodies[number::clients], started, seconds) for number in range(clients)
        ]
        answers = [answer for each in asked for answer in each.result()]
    finished, ms, statuses = zip(*answers, strict=True)
    return Load(time.perf_counter() - started, np.array(finished), np.array(ms), Counter(statuses))


def _client(
    url: str, point: str, bodies: Sequence[bytes], started: float, seconds: float
) -> list[tuple[float, float, int]]:
    """One client: (seconds since the start, ms, status) of each answer."""
    host = urlsplit(url).netloc
    answers: list[tuple[float, float, int]] = []
    connection = http.client.HTTPConnection(host, timeout=60)
    while not answers or answers[-1][0] < seconds:
        begun = time.perf_counter()
        try:
            connection.request(
                "POST",
                f"/predict?point={point}",
                bodies[len(answers) % len(bodies)],
                {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            connection.close()
            status = 0
        now = time.perf_counter()
        answers.append((now - started, 1e3 * (now - begun), status))
    connection.close()
    return answers


def kill_a_replica() -> None:
    """Kill one of the replicas that this process has started."""
    os.kill(_replicas()[0], signal.SIGKILL)


def _replicas() -> list[int]:
    """Processes of replicas below this one."""
    found, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            todo += [int(child) for child in task.read_text().split()]
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::ServeReplica"):
            found.append(pid)
    return sorted(found)


def load_with_a_kill(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[Load, float]:
    """The gate's load in which a replica is killed, and when it was, in seconds from the start."""
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run_load, url, GATE, bodies, clients, seconds)
        time.sleep(seconds * KILLED_AFTER)
        kill_a_replica()
        killed_s = time.perf_counter() - started
        return running.result(), killed_s


def measure(options: Options, clients: int, seconds: float, engine: str) -> Report:
    """Run the benchmark."""
    rounds, seconds = (2, min(seconds, 3.0)) if options.quick else (5, seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        bodies = save_network(path, WIDE_LIST, options.seed, engine)
        settings = ServeSettings(port=0, replicas=NUM_REPLICAS, threads=max(1, options.threads // NUM_REPLICAS))
        with serving(path, settings) as url:
            for point in (GATE, WIDEST):
                run_load(url, point, bodies, clients, 1.0)
            loads: dict[str, list[Load]] = {GATE: [], WIDEST: []}
            for _ in range(rounds):
                for point, own in loads.items():
                    own.append(run_load(url, point, bodies, clients, seconds))
            # A new replica takes some seconds, so that this load is longer.
            killed, killed_s = load_with_a_kill(url, bodies, clients, 5 * seconds)
    ms = {point: np.array([1e3 / load.per_second for load in own]) for point, own in loads.items()}
    return Report(
        [_table(loads, killed, killed_s, clients)],
        Headline("time of a request, gate over static widest", Samples(ms).ratio((GATE,), (WIDEST,)), "", GOAL),
        {
            **{point: [load.figures() for load in own] for point, own in loads.items()},
            "killed": {**killed.figures(), "killed_s": killed_s, "without_answers_s": _longest_gap_s(killed)},
        },
    )


def _longest_gap_s(load: Load) -> float:
    """Longest time without any answer."""
    return float(np.diff(np.sort(load.finished_s)).max())


def _table(loads: dict[str, list[Load]], killed: Load, killed_s: float, clients: int) -> Section:
    rows = [joined(own).row(point) for point, own in loads.items()]
    rows.append(killed.row(f"gate, 1 of {NUM_REPLICAS} replicas killed after {killed_s:.1f} s"))
    return Section(
        f"{clients} clients, {NUM_REPLICAS} replicas; longest time without an answer after the kill: {_longest_gap_s(killed):.2f} s",
        ("operating point", "requests/s", "p50 ms", "p95 ms", "p99 ms", "failed"),
        rows,
    )


if __name__ == "__main__":
    run_benchmark(BENCHMARK, measure, params=PARAMS)
