"""An engine that runs graphs by ONNX's reference implementation, and a clock that only it
advances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsnet.deploy import engines
from dsnet.deploy.engines import Engine, Graph

NAME = "clocked"
TRUNK_MS, TAIL_MS, STATIC_MS = 1.0, 10.0, 100.0
"""Milliseconds of one image in the trunk, in the tail of route 0 and in its static sub-network;
those of route k take k ms more. A graph up to a decision takes the sum of the parts in it and of
the decision."""


class ClockedEngine:
    """The engine `clocked`, whose calls take the time that a test expects; everything else takes
    none."""

    def __init__(self, patch: pytest.MonkeyPatch, decide_ms: float = 0.0) -> None:
        self.decide_ms = decide_ms
        self.clock_s = 0.0
        self.threads: set[int] = set()
        self.last: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        """Input and logits of the last call of each static sub-network, by the name of its
        logits."""
        engine = Engine(NAME, "onnx", self.open, "Clocked")
        patch.setitem(engines._ENGINES, NAME, engine)
        patch.setattr("time.perf_counter", lambda: self.clock_s)
        self.title = engine.title

    def open(self, file: Path, threads: int) -> Graph:
        """See `Engine.open`."""
        from onnx.reference import ReferenceEvaluator

        self.threads.add(threads)
        graph = ReferenceEvaluator(str(file))
        first, output = graph.input_names[0], graph.output_names[0]

        def run(inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
            (images,) = inputs.values()
            self.clock_s += len(images) * self._image_ms(first, graph.output_names) / 1e3
            outputs: Sequence[NDArray[Any]] = graph.run(None, dict(inputs))
            if (first, output[:6]) == ("images", "logits"):
                self.last[output] = images, np.asarray(outputs[0])
            return outputs

        return run

    def _image_ms(self, first: str, outputs: Sequence[str]) -> float:
        """Milliseconds of one image in the graph with this input and these outputs."""
        routes = [int(output.removeprefix("logits_")) for output in outputs if output.startswith("logits_")]
        if outputs[0].startswith("logits_"):
            return (STATIC_MS if first == "images" else TAIL_MS) + routes[0]
        decides = any(output.startswith("route_") for output in outputs)
        return TRUNK_MS + decides * self.decide_ms + sum(TAIL_MS + route for route in routes)
