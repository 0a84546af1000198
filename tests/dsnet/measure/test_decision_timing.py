"""The timed decision of a router reads the same evidence as the router, and is made as often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from dsnet.deploy.segments import CutSegments
from dsnet.measure.decision_timing import decision_calls, timed_routers
from dsnet.network.supernet import Supernet, TrunkOutput
from dsnet.routers.head import Head
from dsnet.routers.tree import GatesRouter
from dsnet.space.route_tree import RouteTree
from tests.dsnet.samples import ROUTER_KINDS, random_images, random_supernet_router, small_supernet, three_gate_supernet


@dataclass(frozen=True)
class Watched(TrunkOutput):
    """Records which parts of the evidence are read."""

    asked: Counter[str] = field(default_factory=Counter)

    def evidence(self, part: str) -> torch.Tensor:
        """The evidence of the real trunk output, recorded."""
        self.asked[part] += 1
        return super().evidence(part)


def watched(supernet: Supernet, num_images: int) -> tuple[CutSegments, Watched]:
    segments = CutSegments(supernet, RouteTree.of(supernet.subnets))
    output = segments.trunk(random_images(num_images))
    return segments, Watched(output.features, output.gate_input, output.hidden)


def timed_calls(supernet: Supernet, segments: CutSegments, output: Watched) -> Mapping[str, Callable[[], object]]:
    routers = timed_routers(supernet.spec, segments, output)
    return decision_calls(routers, segments, output, torch.zeros(len(output.features), 10))


@pytest.mark.parametrize("make", [small_supernet, three_gate_supernet])
@pytest.mark.parametrize("num_images", [1, 5])
def test_every_kind_of_router_is_timed_and_reads_what_it_reads_in_inference(
    make: Callable[[], Supernet], num_images: int
) -> None:
    supernet = make()
    segments, output = watched(supernet, num_images)
    calls = timed_calls(supernet, segments, output)
    assert set(calls) == set(ROUTER_KINDS)
    for kind, decide in calls.items():
        output.asked.clear()
        decide()
        needs = ("hidden",) if kind == "learned_cascade" else random_supernet_router(kind, supernet).needs
        assert output.asked == Counter(needs), kind


def test_a_gate_per_stage_decides_at_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = three_gate_supernet()
    segments, output = watched(supernet, 4)
    calls = timed_calls(supernet, segments, output)
    met: list[int] = []
    step = GatesRouter.step
    monkeypatch.setattr(
        GatesRouter,
        "step",
        lambda self, evidence, executed: met.append(evidence.gate) or step(self, evidence, executed),
    )
    calls["gates"]()
    calls["evidence_gates"]()
    assert met == [0, 1, 2] * 2


def test_a_cascade_decides_from_an_answer_that_was_not_summarised_before(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = small_supernet()
    segments, output = watched(supernet, 4)
    calls = timed_calls(supernet, segments, output)
    summaries = Counter[str]()
    heads = Counter[str]()
    whole, score = torch.Tensor.topk, Head.__call__
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *args, **more: summaries.update(["one"]) or whole(self, *args, **more)
    )
    monkeypatch.setattr(Head, "__call__", lambda self, features: heads.update(["one"]) or score(self, features))
    for _ in range(3):
        calls["cascade"]()
    assert (summaries["one"], heads["one"]) == (3, 0)
    calls["learned_cascade"]()
    assert heads["one"] == 1
