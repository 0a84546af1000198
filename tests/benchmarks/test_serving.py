"""The load test of the server: its bundle, and what a client counts."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from benchmarks.dynamic_inference import WIDE_LIST
from benchmarks.serving import GATE, NUM_IMAGES, WIDEST, joined, run_load, save_network
from dsnet.deploy.bundle import check_bundle_examples, load_bundle
from orchestration.serving.requests import read_images


@pytest.mark.slow
def test_the_gate_spreads_the_images_of_the_requests_and_the_widest_takes_one_route(tmp_path: Path) -> None:
    bodies = save_network(tmp_path / "bundle", WIDE_LIST, seed=0)
    bundle = load_bundle(tmp_path / "bundle")
    assert check_bundle_examples(bundle) == 16
    pixels = torch.cat([read_images(body, "application/json", bundle).pixels for body in bodies])
    routes = bundle.at(GATE)(pixels).routes
    counts = torch.bincount(routes)
    assert len(counts) == len(WIDE_LIST.routes)
    assert int(counts.min()) > NUM_IMAGES / len(counts) / 2
    assert set(bundle.at(WIDEST)(pixels[:8]).routes.tolist()) == {len(counts) - 1}


class Refuses(BaseHTTPRequestHandler):
    """Answers 503 to every body "no", and 200 to the others, if the path is as expected."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_served = body != b"no" and self.path == "/predict?point=gate"
        content = json.dumps({"ok": is_served}).encode()
        self.send_response(200 if is_served else 503)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def test_clients_count_every_answer_by_its_status() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        load = run_load(url, GATE, [b"yes", b"no", b"yes"], clients=3, seconds=0.2)
        server.shutdown()
    assert load.statuses.keys() == {200, 503}
    assert load.statuses.total() == len(load.ms) == len(load.finished_s) >= 6
    assert load.seconds >= 0.2
    assert load.per_second == load.statuses[200] / load.seconds
    both = joined([load, load])
    assert both.statuses == Counter({status: 2 * number for status, number in load.statuses.items()})
    assert both.per_second == pytest.approx(load.per_second)


def test_a_server_that_is_gone_is_counted_as_broken_connections() -> None:
    load = run_load("http://127.0.0.1:1", GATE, [b"yes"], clients=1, seconds=0.01)
    assert load.statuses.keys() == {0}
