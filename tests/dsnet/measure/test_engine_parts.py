"""Latency with an engine is the time of its graphs, and these are the sub-networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsnet.deploy import engines
from dsnet.deploy.engines import TORCH, Engine, timing_engine
from dsnet.errors import ConfigError
from dsnet.families import rebuild
from dsnet.measure.engine_parts import EngineParts
from dsnet.measure.latency import device_name, measure_latency
from dsnet.measure.latency_table import LatencyTable, Timing
from dsnet.measure.settings import MAIN_DEVICE, DeviceSettings, LatencySettings
from tests.dsnet.measure.clocked_engine import NAME, STATIC_MS, TAIL_MS, TRUNK_MS, ClockedEngine
from tests.dsnet.network.test_entry_gate import early_set, lively
from tests.dsnet.samples import ROUTER_KINDS, small_supernet

DECIDE_MS = 0.25
QUICK = LatencySettings(batch_sizes=(1, 3), group_sizes=(1, 2), repeats=2, warmup=1, threads=2)


def medians(row: dict[str, Timing]) -> list[float]:
    return [timing.median_ms for timing in row.values()]


@pytest.mark.slow
def test_the_times_are_those_of_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    supernet = small_supernet()
    with monkeypatch.context() as patch:
        engine = ClockedEngine(patch, DECIDE_MS)
        table = measure_latency(supernet, 16, replace(QUICK, engine=NAME, repeats=1, warmup=0))
    routes = range(len(supernet.subnets))
    assert engine.threads == {2}
    assert table.device == f"{device_name('cpu')}, {engine.title}"
    assert engine.title.startswith("Clocked 1.")
    for size in (1, 3):
        assert medians(table.subnets[size]) == pytest.approx([size * (STATIC_MS + k) for k in routes])
    for size in (1, 2):
        assert medians(table.tails[size]) == pytest.approx([size * (TAIL_MS + k) for k in routes])
        assert table.trunk[size].median_ms == pytest.approx(size * TRUNK_MS)
        decisions = {kind: row[size].median_ms for kind, row in table.decisions.items()} | {
            "gate": table.decide[size].median_ms
        }
        assert decisions == {kind: pytest.approx(size * DECIDE_MS) for kind in ROUTER_KINDS}
    assert LatencyTable.from_json(table.to_json()) == table
    for k, subnet in enumerate(supernet.subnets):
        images, logits = engine.last[f"logits_{k}"]
        expected = supernet(torch.from_numpy(images), subnet)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_graphs_behind_an_entry_gate_are_the_sub_networks() -> None:
    pytest.importorskip("onnxscript", reason="extra deploy is not installed")
    pytest.importorskip("onnxruntime", reason="extra deploy is not installed")
    supernet = lively(rebuild(early_set("ds_tiny")))
    engine = timing_engine("onnxruntime")
    assert engine is not None
    parts = EngineParts.open(supernet, 16, engine, threads=1, routers={})
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = parts.trunk(images).features
    torch.testing.assert_close(features, images)
    for subnet in supernet.subnets:
        expected = supernet(images, subnet)
        torch.testing.assert_close(parts.whole[subnet.name](images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(parts.tails[subnet.name](features), expected, rtol=1e-4, atol=1e-4)


def test_every_device_has_its_engine_and_auto_is_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines._ENGINES, "there", Engine("there", "torch", _never))  # type: ignore[arg-type]
    monkeypatch.setattr(engines, "_EXPORT_PACKAGES", ())
    settings = replace(QUICK, device="auto", engine="there", devices={"other": DeviceSettings(device="auto")})
    alone = settings.by_device(lambda device: "cuda")
    assert {name: (own.device, own.engine) for name, own in alone.items()} == {
        MAIN_DEVICE: ("cpu", "there"),
        "other": ("cuda", TORCH),
    }


def _never(*arguments: object) -> object:
    raise AssertionError("no graph is opened")


@pytest.mark.parametrize("packages", [("no_such_package", "torch"), ("torch", "no_such_package")])
def test_a_missing_package_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, packages: tuple[str, str]
) -> None:
    own, of_export = packages
    monkeypatch.setitem(engines._ENGINES, "there", Engine("there", own, _never))  # type: ignore[arg-type]
    monkeypatch.setattr(engines, "_EXPORT_PACKAGES", (of_export,))
    settings = LatencySettings(devices={"a": DeviceSettings(engine="there")})
    with pytest.raises(ConfigError, match=r"engine there: package no_such_package is not installed: pip install"):
        settings.by_device()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"engine": "onnxruntme"}, r"measure\.engine is 'onnxruntme'; did you mean 'onnxruntime'\? known: "),
        ({"engine": "onnxruntime", "device": "cuda"}, r"measure\.engine: engine onnxruntime runs on the CPU only"),
        (
            {"devices": {"a": DeviceSettings(engine="onnxruntime", device="cuda")}},
            r"measure\.devices\.a\.engine: .* write device: cpu, or engine: torch",
        ),
        ({"devices": {"a": DeviceSettings(engine="tf")}}, r"measure\.devices\.a\.engine is 'tf'"),
    ],
)
def test_an_engine_that_cannot_run_there_is_refused(own: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatencySettings(**own)  # type: ignore[arg-type]
