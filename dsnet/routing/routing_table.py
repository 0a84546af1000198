"""The routing table: every route's answer to every image of a split, from which any router can be
scored exactly.

On a frozen supernet, an image's cross-entropy, correctness and confidence under each route and
every gate's input are constants (docs/methods.md, section 5); with the table, scoring a router
takes about a second. With several gates a route is a path, and a gate's input depends on earlier
choices: the table holds it once for every node of the tree of paths. A table is plain numpy in a
safetensors file and never holds more than one split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float16, Float32, Float64, Int32, Int64, Shaped
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsnet.errors import CheckpointError
from dsnet.files import parse_json, reading, replacing
from dsnet.space.route_tree import RouteTree

SCHEMA_VERSION = 2
MAX_FULL_CLASSES = 100
NUM_TOP_LOGITS = 32


@dataclass(frozen=True)
class GateColumns:
    """The columns of a table's `evidence` that belong to one gate."""

    layouts: tuple[Mapping[str, tuple[int, int]], ...]
    """For each node of the gate: part of the evidence -> (first column, end). The parts are the
    mean, deviation and maximum of the gate's input, and the hidden vector."""
    pooling_madds: tuple[int, ...]
    """For each node, the MAdds of pooling the gate's input once."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_json` reads."""
        layouts = [{name: list(span) for name, span in layout.items()} for layout in self.layouts]
        return {"layouts": layouts, "pooling_madds": list(self.pooling_madds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GateColumns:
        """Rebuild the columns from the result of `to_json`."""
        layouts = tuple({name: (span[0], span[1]) for name, span in layout.items()} for layout in data["layouts"])
        return cls(layouts, tuple(data["pooling_madds"]))


@dataclass(frozen=True)
class RoutingTable:
    """Answers of K routes (members of the SubnetSet, in its order) to the N images of one split."""

    split: str
    routes: tuple[str, ...]
    """Names of the sub-networks."""
    tree: RouteTree
    """The decision tree of the routes over the gates."""
    gates: tuple[GateColumns, ...]
    """The columns of `evidence` of each gate."""
    trunk_madds: int
    """MAdds that every route costs before the first gate decides."""
    num_classes: int
    """Number of classes of the task; `logits` may hold fewer."""
    image_ids: Int64[np.ndarray, " images"]
    """[N] index in the data set."""
    labels: Int64[np.ndarray, " images"]
    """[N] class of each image."""
    madds: Int64[np.ndarray, " routes"]
    """[K] MAdds of the whole sub-network, without the gate's head."""
    ce: Float32[np.ndarray, "images routes"]
    """[N, K] unsmoothed cross-entropy: p(y) = exp(-ce)."""
    predicted: Int64[np.ndarray, "images routes"]
    """[N, K] predicted class."""
    correct1: Bool[np.ndarray, "images routes"]
    """[N, K] whether the prediction is correct."""
    correct5: Bool[np.ndarray, "images routes"]
    """[N, K] whether the label is among the five largest logits."""
    confidence: Float32[np.ndarray, "images routes"]
    """[N, K] largest probability."""
    margin: Float32[np.ndarray, "images routes"]
    """[N, K] largest minus second largest probability."""
    entropy: Float32[np.ndarray, "images routes"]
    """[N, K] entropy of the probabilities in nats."""
    logits: Float16[np.ndarray, "images routes kept_classes"]
    """[N, K, L] logits of all classes, or the 32 largest where there are more than 100 classes."""
    logit_classes: Int32[np.ndarray, "images routes listed_classes"]
    """[N, K, L] the classes of `logits`, or empty, [N, K, 0], where `logits` are in class order."""
    evidence: Float32[np.ndarray, "images columns"]
    """[N, E] evidence of all gates at all their nodes, side by side; `gates` gives the columns."""

    def __post_init__(self) -> None:
        shape = (len(self.labels), len(self.routes))
        for name in ("ce", "predicted", "correct1", "correct5", "confidence", "margin", "entropy"):
            met = getattr(self, name).shape
            if met != shape:
                raise ValueError(f"routing table {self.split}: {name} has shape {met}, expected {shape}")
        if self.madds.shape != shape[1:] or self.evidence.shape[0] != shape[0] or self.image_ids.shape != shape[:1]:
            raise ValueError(
                f"routing table {self.split}: madds, evidence or image_ids do not fit {shape[0]} images and {shape[1]} routes"
            )
        if self.logits.shape[:2] != shape or self.logit_classes.shape[:2] != shape:
            raise ValueError(
                f"routing table {self.split}: its logits do not fit {shape[0]} images and {shape[1]} routes"
            )
        nodes = [gate.num_nodes for gate in self.tree.gates]
        if self.tree.num_routes != shape[1] or any(
            nodes != [len(of_gate) for of_gate in kept]
            for kept in ([gate.layouts for gate in self.gates], [gate.pooling_madds for gate in self.gates])
        ):
            raise ValueError(
                f"routing table {self.split}: its tree does not fit its {shape[1]} routes, or its gates do not fit the tree"
            )
        stops = (stop for gate in self.gates for layout in gate.layouts for _, stop in layout.values())
        last = max(stops, default=0)  # none where no router reads any evidence
        if last != self.evidence.shape[1]:
            raise ValueError(
                f"routing table {self.split}: its gates keep {last} columns of evidence, but it has {self.evidence.shape[1:]}"
            )

    @property
    def num_images(self) -> int:
        """Number of images, N."""
        return len(self.labels)

    @property
    def num_routes(self) -> int:
        """Number of routes, K."""
        return len(self.routes)

    def part(self, name: str, gate: int = 0, node: int = 0) -> Float32[np.ndarray, "images features"]:
        """One part of the evidence at a node of a gate, [N, length of the part].

        Raises:
            KeyError: there is no such part at this gate; some parts are kept only at the first
                gate.
        """
        start, stop = self.gates[gate].layouts[node][name]
        return self.evidence[:, start:stop]

    def top1(self) -> Float64[np.ndarray, " routes"]:
        """[K] top-1 accuracy of each route on its own, 0..1."""
        return self.correct1.mean(0, dtype=np.float64)

    ARRAYS: ClassVar[tuple[str, ...]]
    """Names of the array fields."""

    def arrays(self) -> dict[str, Shaped[np.ndarray, "*_"]]:
        """The array fields by name, e.g. for a shared object store."""
        return {name: getattr(self, name) for name in self.ARRAYS}

    def meta(self) -> dict[str, Any]:
        """All fields except the arrays, as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "split": self.split,
            "routes": list(self.routes),
            "tree": self.tree.to_json(),
            "gates": [gate.to_json() for gate in self.gates],
            "trunk_madds": self.trunk_madds,
            "num_classes": self.num_classes,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Shaped[np.ndarray, "*_"]], meta: Mapping[str, Any]) -> RoutingTable:
        """Build a table from the results of `arrays()` and `meta()`; the arrays are not copied.

        Raises:
            CheckpointError: the schema version is another one, or the arrays do not fit together.
        """
        if meta.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"the routing table has schema version {meta.get('schema_version')!r}, but this release reads {SCHEMA_VERSION}"
            )
        try:
            return cls(
                split=meta["split"],
                routes=tuple(meta["routes"]),
                tree=RouteTree.from_json(meta["tree"]),
                gates=tuple(GateColumns.from_json(gate) for gate in meta["gates"]),
                trunk_madds=int(meta["trunk_madds"]),
                num_classes=int(meta["num_classes"]),
                **arrays,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the routing table's parts do not belong together: {error}") from error

    def save(self, path: Path) -> None:
        """Write the table as one safetensors file, atomically.

        Raises:
            StorageError: it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(value) for name, value in self.arrays().items()}
        # A single entry, so that equal tables give equal files: safetensors writes several in no
        # fixed order.
        metadata = {"routing_table": json.dumps({**self.meta(), "sha256": _digest(arrays)})}
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> RoutingTable:
        """Read a table.

        Raises:
            CheckpointError: the file is missing, damaged or of another version.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such routing table")
        try:
            with reading(path), safe_open(path, framework="numpy") as stored:
                meta = parse_json((stored.metadata() or {})["routing_table"], str(path))
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            if meta["sha256"] != _digest(arrays):
                raise ValueError("its arrays do not match the hash stored with them")
            return cls.from_arrays(arrays, meta)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, CheckpointError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as a routing table ({error}); delete its stage folder and launch again"
            ) from error


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the contiguous arrays in the order of their names.

    Needed because safetensors itself checks only a file's header.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].data)
    return digest.hexdigest()


_META = ("split", "routes", "tree", "gates", "trunk_madds", "num_classes")
RoutingTable.ARRAYS = tuple(field.name for field in fields(RoutingTable) if field.name not in _META)
