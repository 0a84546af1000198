"""A real server, started as a user starts it: answers, batches, limits, numbers, a lost replica and
the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import Command
from dsnet.deploy.bundle import Bundle, load_bundle
from dsnet.deploy.prediction import Predictions
from tests.dsnet.samples import random_pixels
from tests.orchestration.samples import Listeners, call
from tests.orchestration.serving.samples import png, save_served

pytest.importorskip("grpc", reason="extra serve is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAX_BATCH, MAX_QUEUE = 8, 16
OPTIONS = ("--port", 0, "--batch", MAX_BATCH, "--wait-ms", 50, "--queue", MAX_QUEUE, "--max-mib", 1, "--threads", 1)
LOCALHOST = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Answered:
    """Status, headers and text of an answer."""

    status: int
    headers: Any = field(repr=False)
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Server:
    """A running server and the bundle that it serves."""

    command: Command
    listeners: Listeners
    url: str
    bundle: Bundle

    def ask(self, path: str, body: bytes | None = None, kind: str = "image/png") -> Answered:
        """GET, or POST with a body."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        try:
            with DIRECT.open(request, timeout=60) as answer:
                return Answered(answer.status, answer.headers, answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Answered(error.code, error.headers, error.read().decode())

    def ask_pixels(self, pixels: Any, query: str = "") -> Answered:
        return self.ask(f"/predict{query}", json.dumps({"pixels": pixels.tolist()}).encode(), "application/json")

    def number(self, name: str) -> float:
        """A number of /metrics; 0 if it is not there."""
        lines = self.ask("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def expected(self, row: int, found: Predictions) -> dict[str, Any]:
        """What the server must answer for a row of the bundle's own answer."""
        label = int(found.classes[row])
        return {
            "class": self.bundle.class_names[label],
            "probability": pytest.approx(float(found.probabilities[row, label]), rel=1e-4),
            "route": self.bundle.route_names[int(found.routes[row])],
            "madds": int(found.madds[row]),
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    command = Command(folder, "serve", save_served(folder / "bundle"), *OPTIONS)
    listeners = Listeners(command)
    try:
        assert command.process.stdout is not None
        line = command.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None, command.wait()
        yield Server(command, listeners, found[0], load_bundle(folder / "bundle"))
    finally:
        listeners.stop()
        command.end()


def test_answers_are_those_of_the_bundle_alone_in_lists_and_together(server: Server) -> None:
    pixels = random_pixels(24, seed=9)
    found = server.bundle(pixels)
    assert len(set(found.routes.tolist())) > 1
    before = {name: server.number(f"dsnet_batch_images_{name}") for name in ("sum", "count")}
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda image: server.ask("/predict", png(image)), pixels))
    images, batches = (server.number(f"dsnet_batch_images_{name}") - before[name] for name in ("sum", "count"))
    assert images == 24
    assert batches < 24, "requests that arrive together must share batches"
    listed = [answer for part in pixels.split(12) for answer in server.ask_pixels(part).json["predictions"]]
    for row, answer in enumerate(answers):
        content = answer.json
        assert answer.status == 200
        assert content.pop("operating_point") == "gate"
        assert 0 < content.pop("milliseconds") < 60_000
        expected = server.expected(row, found)
        assert content == expected
        assert listed[row] == expected


def test_the_budget_of_a_request_chooses_its_operating_point_also_within_a_batch(server: Server) -> None:
    points = [point for point in server.bundle.operating_points if point.name != "gate"]
    pixels = random_pixels(1, seed=3)

    def ask(name: str) -> Answered:
        return server.ask_pixels(pixels, f"?point={name}")

    with ThreadPoolExecutor(len(points)) as threads:
        answers = list(threads.map(ask, [point.name for point in points]))
    for point, answer in zip(points, answers, strict=True):
        assert answer.json["operating_point"] == point.name
        (prediction,) = answer.json["predictions"]
        assert prediction == server.expected(0, server.bundle.at(point.name)(pixels))
        assert prediction["route"] == point.name
    slow = server.ask_pixels(pixels, "?budget_latency=1.5").json
    assert slow["operating_point"] == server.bundle.operating_points.choose(latency_ms=1.5).name
    refused = server.ask_pixels(pixels, "?budget_madds=1e-9")
    assert refused.status == 400
    assert "no operating point costs at most" in refused.json["error"]


def test_what_cannot_be_answered_gets_its_status_and_a_reason(server: Server) -> None:
    for body, status, reason in (
        (b"no picture", 400, "does not decode"),
        (bytes(2**20 + 1), 413, "larger than 1 MiB"),
        *[(bytes(8 * 2**20), 413, "larger than 1 MiB")] * 5,  # larger than what a connection buffers
    ):
        answer = server.ask("/predict", body)
        assert (answer.status, reason in answer.json["error"]) == (status, True), answer
    too_many = server.ask_pixels(random_pixels(MAX_QUEUE + 1))
    assert (too_many.status, "17 images" in too_many.json["error"]) == (413, True)
    assert server.ask("/predict").status == 405
    unknown = server.ask("/predict/all", b"x")
    assert (unknown.status, "/healthz" in unknown.json["error"]) == (404, True)
    assert server.ask("/").json["classes"] == list(server.bundle.class_names)


def test_a_full_queue_is_503_while_health_and_numbers_still_answer(server: Server) -> None:
    pixels, before = random_pixels(12), server.number('dsnet_requests_total{status="503"}')
    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(server.ask_pixels, pixels) for _ in range(20)]
        health = server.ask("/healthz")
    answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status == 503]
    assert {answer.status for answer in answers} == {200, 503}
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    assert server.number('dsnet_requests_total{status="503"}') == before + len(refused)
    assert (health.status, health.json) == (200, {"status": "ok", "examples": 16})


def test_numbers_count_what_was_answered(server: Server) -> None:
    pixels = random_pixels(10, seed=7)
    found = server.bundle(pixels)
    names = {route: server.bundle.route_names[route] for route in set(found.routes.tolist())}

    def numbers() -> dict[str, float]:
        per_route = {
            f"{kind} {name}": server.number(f'dsnet_{kind}_total{{point="gate",route="{name}"}}')
            for name in names.values()
            for kind in ("images", "madds")
        }
        return {
            **per_route,
            "requests": server.number('dsnet_requests_total{status="200"}'),
            "timed": server.number("dsnet_request_seconds_count"),
        }

    before = numbers()
    assert server.ask_pixels(pixels).status == 200
    after = numbers()
    expected = {"requests": 1.0, "timed": 1.0}
    for route, name in names.items():
        rows = found.routes == route
        expected |= {f"images {name}": float(rows.sum()), f"madds {name}": float(found.madds[rows].sum())}
    assert {name: after[name] - before[name] for name in after} == expected


def test_a_replica_that_was_killed_is_replaced_and_the_numbers_stay(server: Server) -> None:
    requests = server.number('dsnet_requests_total{status="200"}')
    (replica,) = [pid for pid in server.command.pids() if _title(pid).startswith("ray::ServeReplica")]
    os.kill(replica, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (answer := server.ask_pixels(random_pixels(1))).status != 200:
        assert answer.status in (500, 503)
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
    assert server.number('dsnet_requests_total{status="200"}') == requests + 1


def _title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_ctrl_c_ends_it_soon_and_completely_and_it_listened_on_localhost_only(server: Server) -> None:
    started = time.monotonic()
    server.command.interrupt()
    answer = server.command.wait(timeout_s=60)
    assert time.monotonic() - started < 10
    assert answer.code == 0
    assert answer.err == "starting Ray Serve ...\nstopping ...\n"
    assert server.command.left_behind() == []
    addresses = server.listeners.stop()
    assert addresses
    assert addresses <= LOCALHOST
    assert server.listeners.remotes <= LOCALHOST


@pytest.mark.long
@pytest.mark.parametrize("victim", ["all", "raylet"])
def test_it_ends_soon_when_all_its_processes_are_stopped_or_ray_is_lost(tmp_path: Path, victim: str) -> None:
    command = Command(tmp_path, "serve", save_served(tmp_path / "bundle"), *OPTIONS)
    try:
        assert command.process.stdout is not None
        assert "http://127.0.0.1" in command.process.stdout.readline()
        started = time.monotonic()
        if victim == "all":  # as a service manager does it
            os.killpg(command.process.pid, signal.SIGTERM)
        else:
            (raylet,) = [pid for pid in command.pids() if "raylet/raylet" in _title(pid)]
            os.kill(raylet, signal.SIGKILL)
        answer = command.wait(timeout_s=60)
        assert time.monotonic() - started < 20
        assert command.left_behind() == []
    finally:
        command.end()
    if victim == "all":
        assert answer.code == 0
        assert answer.err.startswith("starting Ray Serve ...\nstopping ...\n")  # Ray may add a line of its own
        assert "Traceback" not in answer.err
    else:
        assert answer.code == 6
        told = f"error: Ray was lost: its raylet (process {raylet}) has ended. The server has ended; start it again"
        assert answer.err.splitlines()[1:] == [told]


def test_what_cannot_be_served_is_told_before_anything_starts(tmp_path: Path) -> None:
    bundle = save_served(tmp_path / "bundle")
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    (damaged / "examples.safetensors").write_bytes(b"nothing")
    for arguments, code, reason in (
        ([damaged], 3, "examples.safetensors"),
        ([tmp_path / "none"], 9, "no such bundle"),
        ([bundle, "--budget-madds", "1e-9"], 9, "no operating point costs at most"),
        (
            [bundle, "--budget-madds", "1", "--budget-latency", "1"],
            2,
            "--budget-madds and --budget-latency are two budgets",
        ),
    ):
        answer = call(tmp_path, "serve", *arguments)
        assert (answer.code, reason in answer.err) == (code, True), answer
