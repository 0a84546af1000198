import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dsnet.errors import ConfigError, PreflightError
from orchestration.tracking.background import MlflowTracker
from orchestration.tracking.database import experiment_of
from orchestration.tracking.protocol import TrackedRun, TrackingSummary
from orchestration.tracking.rows import COLOUR_TAG, COLOURS
from orchestration.tracking.server import free_port, serve_ui
from orchestration.tracking.store import RUN_ID
from orchestration.tracking.view import view_path
from tests.hostile import write_hostile_modules

NOW_MS = 1_700_000_000_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOPBACK_HEX = "0100007F"


def process_tree(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {pid}.union(*(process_tree(int(child)) for child in children))


def sockets_of(pids: set[int]) -> set[str]:
    """Inodes of the sockets that these processes have open."""
    links = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.add(os.readlink(descriptor))
            except FileNotFoundError:
                continue
    return {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}


def listening_addresses(pids: set[int]) -> set[tuple[str, int]]:
    """(address in the kernel's hex, port) of every listening TCP socket of these processes."""
    inodes, found = sockets_of(pids), set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def fetch(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return bytes(answer.read())


def write_through_server(url: str, folder: Path) -> TrackingSummary:
    """A tiny sweep over HTTP, as `tracking.uri: http://...` does it."""
    tracker = MlflowTracker(url, "over HTTP", folder, "digits", warn=pytest.fail)
    tracker.parent(TrackedRun("digits", "digits", "sweep", NOW_MS))
    for slot in range(2):
        tracker.trial(TrackedRun(f"digits/{slot}", f"trial-{slot}", "trial", NOW_MS, NOW_MS, metrics={"top1": 0.5}))
    return tracker.close("FINISHED", NOW_MS, 60)


POINTS = {
    "subnet-00": ("subnet", "route", 0.5, 1.0),
    "subnet-01": ("subnet", "route", 0.8, 4.0),
    "largest": ("subnet", "teacher", 0.99, 9.0),
    "trial-0000": ("trial", "front", 0.7, 2.0),
    "trial-0001": ("trial", "knee", 0.75, 2.5),
    "trial-0002": ("trial", "trial", 0.6, 3.0),
}
"""Name -> kind, role, top-1 and MAdds."""
SWEEP = TrackedRun("digits/1234", "digits", "sweep", NOW_MS)


def write_points(tracker: MlflowTracker, report: Path) -> TrackingSummary:
    """A finished sweep with static and dynamic points, a report and a description."""
    tracker.parent(SWEEP)
    for name, (kind, role, top1, madds_m) in POINTS.items():
        metrics = {"top1": top1, "madds_m": madds_m}
        tags = {"role": role, COLOUR_TAG: COLOURS[role]}
        tracker.trial(TrackedRun(f"digits/{name}", name, kind, NOW_MS, NOW_MS, metrics=metrics, tags=tags))  # type: ignore[arg-type]
    tracker.artifact(report)
    tracker.describe(f"![picture](get-artifact?path=report.html&run_uuid={RUN_ID})")
    return tracker.close("FINISHED", NOW_MS, 60)


@dataclass(frozen=True)
class Served:
    """A server over a runs folder that was moved after it was written to."""

    uri: str
    artifacts: Path
    url: str
    busy_port: int
    before: set[int]
    """Processes before it was started."""
    servers: set[int]
    stop: Callable[[], None]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    report = folder / "report.html"
    report.write_text("<h1>the front</h1>")
    old, new = folder / "old runs", folder / "new"
    old.mkdir()
    tracker = MlflowTracker(f"sqlite:///{old}/mlflow.db", "digits", old / "artifacts", "digits", warn=pytest.fail)
    assert write_points(tracker, report).num_unsent == 0
    old.rename(new)
    before = process_tree(os.getpid())
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        busy_port = taken.getsockname()[1]
        uri, artifacts = f"sqlite:///{new}/mlflow.db", new / "artifacts"
        stack.enter_context(chdir(write_hostile_modules(folder / "photos")))
        url = stack.enter_context(serve_ui(uri, artifacts, port=busy_port))
        servers = process_tree(os.getpid()) - before
        yield Served(uri, artifacts, url, busy_port, before, servers, stack.close)


@pytest.mark.slow
def test_the_page_is_served_to_this_machine_alone_and_shows_the_artifacts_of_a_moved_folder(
    served: Served, tmp_path: Path
) -> None:
    url = served.url
    assert served.port != served.busy_port
    assert listening_addresses(served.servers) == {(LOOPBACK_HEX, served.port)}
    assert b"<title>MLflow</title>" in fetch(url)
    (report,) = served.artifacts.rglob("report.html")
    run_id = report.parent.parent.name
    assert fetch(f"{url}/get-artifact?path=report.html&run_uuid={run_id}") == report.read_bytes()
    note = MlflowClient(served.uri).get_run(run_id).data.tags["mlflow.note.content"]
    assert fetch(f"{url}/{note.partition('(')[2].rstrip(')')}") == report.read_bytes()
    assert [write_through_server(url, tmp_path).num_unsent for _ in range(2)] == [0, 0]
    client = MlflowClient(served.uri)
    through_server = client.get_experiment_by_name("over HTTP")
    assert through_server is not None
    assert len(client.search_runs([through_server.experiment_id])) == 3


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_link_shows_a_chart_of_accuracy_over_cost_with_static_and_dynamic_points_without_a_click(
    served: Served, tmp_path: Path
) -> None:
    experiment = experiment_of(served.uri, SWEEP.uid)
    assert experiment is not None
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    command = [str(CHROMIUM), *options.split(), "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path}", "--window-size=1400,1000", "--virtual-time-budget=60000"]
    link = served.url + view_path(experiment, SWEEP.uid)
    dom = subprocess.run([*command, link], capture_output=True, text=True, timeout=120, check=True).stdout
    titles = re.findall(r'class="([xy])title"[^>]*data-unformatted="([^"]*)"', dom)
    assert titles == [("x", "madds_m"), ("y", "top1")]
    fills = re.findall(r'<path class="point [^>]*fill: rgb\((\d+), (\d+), (\d+)\)', dom)
    drawn = Counter(f"#{int(red):02x}{int(green):02x}{int(blue):02x}" for red, green, blue in fills)
    shown = [role for _, role, _, _ in POINTS.values() if role != "teacher"]
    assert drawn == Counter(COLOURS[role] for role in shown)


@pytest.mark.slow
def test_a_copy_that_is_written_to_again_holds_its_own_artifacts(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("first")
    original, copy = tmp_path / "original", tmp_path / "a copy"
    original.mkdir()
    for folder, text in ((original, "first"), (copy, "again")):
        if folder is copy:
            shutil.copytree(original, copy)
        report.write_text(text)
        tracker = MlflowTracker(
            f"sqlite:///{folder}/mlflow.db", "digits", folder / "artifacts", "digits", warn=pytest.fail
        )
        assert write_points(tracker, report).num_unsent == 0
    assert [found.read_text() for found in original.rglob("report.html")] == ["first"]
    assert [found.read_text() for found in copy.rglob("report.html")] == ["again"]


@pytest.mark.slow
def test_the_server_goes_away_with_all_its_processes(served: Served) -> None:
    assert served.servers
    served.stop()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in served.servers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process_tree(os.getpid()) == served.before
    assert listening_addresses(served.servers & process_tree(os.getpid())) == set()


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="ended with status"), serve_ui("nonsense://x", tmp_path, port=0):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2"])
def test_no_other_host_is_served(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="ssh -L"), serve_ui("sqlite:///x.db", tmp_path, host=host):
        pass


def test_a_store_that_is_a_server_is_not_served_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="open it in a browser"), serve_ui("http://127.0.0.1:5000", tmp_path):
        pass


def test_a_free_port_is_kept_and_a_busy_one_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        assert free_port(busy) not in (0, busy)
    assert free_port(busy) == busy
