"""The routing table against each image and each route on its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dsnet.data.tensors import Batch, TensorData
from dsnet.errors import CheckpointError
from dsnet.measure import evaluate
from dsnet.measure.evaluate import build_routing_table, join_tables, subnet_accuracy
from dsnet.network.supernet import EVIDENCE_PARTS, Supernet
from dsnet.routing.routing_table import MAX_FULL_CLASSES, NUM_TOP_LOGITS, RoutingTable, _digest
from dsnet.space.cost import subnet_cost
from dsnet.space.route_tree import RouteTree
from tests.dsnet.cases import CASES, FAMILIES, Case
from tests.dsnet.samples import (
    NORMALIZATION,
    lively_supernet,
    random_table,
    random_tree,
    small_supernet,
    tensor_data,
    three_gate_supernet,
)
from tests.shapes import unchecked_shapes

GATED_CASES = [case for case in CASES if case.norm in (None, "private_affine")]
"""One way to normalise of each family's small options, and all other options."""


def assert_equals_brute_force(table: RoutingTable, supernet: Supernet, data: TensorData) -> None:
    """Every number of every image and route from a forward of its own."""
    part = data.splits["val"]
    for row in range(table.num_images):
        image = NORMALIZATION.apply(part.images[row : row + 1])
        label = int(part.labels[row])
        for route, subnet in enumerate(supernet.subnets):
            with torch.no_grad():
                logits = supernet(image, subnet)[0].double().numpy()
            p = np.exp(logits - logits.max())
            p /= p.sum()
            ranked = np.argsort(-logits)
            assert table.ce[row, route] == pytest.approx(-np.log(p[label]), rel=1e-4, abs=1e-5)
            assert table.predicted[row, route] == ranked[0]
            assert table.correct1[row, route] == (ranked[0] == label)
            assert table.correct5[row, route] == (label in ranked[:5])
            assert table.confidence[row, route] == pytest.approx(p[ranked[0]], rel=1e-4)
            assert table.margin[row, route] == pytest.approx(p[ranked[0]] - p[ranked[1]], rel=1e-3, abs=1e-5)
            assert table.entropy[row, route] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4, abs=1e-5)
            stored = table.logits[row, route]
            classes = table.logit_classes[row, route] if table.logit_classes.shape[2] else np.arange(len(logits))
            np.testing.assert_allclose(stored, logits[classes], rtol=2e-3, atol=2e-3)
            assert set(classes[: len(stored)]) == set(ranked[: len(stored)])


@pytest.mark.parametrize("family", FAMILIES)
def test_table_equals_brute_force(family: str) -> None:
    supernet, data = lively_supernet(family), tensor_data(9)
    table = build_routing_table(supernet, data, "val", NORMALIZATION, batch_size=4)
    assert_equals_brute_force(table, supernet, data)
    assert table.routes == tuple(subnet.name for subnet in supernet.subnets)
    assert table.madds.tolist() == [subnet_cost(supernet.spec, subnet, 16).madds for subnet in supernet.subnets]
    assert table.trunk_madds == subnet_cost(supernet.spec, supernet.subnets[0], 16).trunk_madds
    assert table.image_ids.tolist() == data.ids("val").tolist()
    assert table.labels.tolist() == data.labels("val").tolist()
    assert table.logit_classes.shape == (9, len(supernet.subnets), 0)


def test_every_path_through_three_gates_equals_brute_force() -> None:
    supernet, data = three_gate_supernet(), tensor_data(5)
    table = build_routing_table(supernet, data, "val", NORMALIZATION, batch_size=3)
    assert table.num_routes == 8
    assert table.tree == RouteTree.of(supernet.subnets)
    assert_equals_brute_force(table, supernet, data)


def test_more_than_100_classes_keep_the_top_32_logits() -> None:
    supernet, data = lively_supernet(num_classes=120), tensor_data(6, num_classes=120)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    assert MAX_FULL_CLASSES == 100
    assert table.logits.shape == table.logit_classes.shape == (6, 3, NUM_TOP_LOGITS)
    assert_equals_brute_force(table, supernet, data)


def assert_evidence_equals_each_path_alone(table: RoutingTable, supernet: Supernet, data: TensorData) -> None:
    """Every part that is kept at every gate, from a forward of every image along every path."""
    for row in range(table.num_images):
        for route, subnet in enumerate(supernet.subnets):
            x = NORMALIZATION.apply(data.images("val")[row : row + 1])
            for gate, branches in enumerate(table.tree.gates):
                with torch.no_grad():
                    output = supernet.upto_gate(gate, x, subnet)
                node = branches.node_of[route]
                seen = output.gate_input[0].double()
                stream = (seen.T if seen.ndim == 2 else seen.flatten(1)).numpy()  # tokens have channels last
                expected = {
                    "mean": stream.mean(1),
                    "deviation": stream.std(1),
                    "maximum": stream.max(1),
                    "hidden": output.hidden[0].numpy(),
                }
                for part in table.gates[gate].layouts[node]:
                    met = table.part(part, gate, node)[row]
                    np.testing.assert_allclose(met, expected[part], rtol=1e-4, atol=1e-5)
                x = output.features


@pytest.mark.slow
@pytest.mark.parametrize("case", GATED_CASES, ids=str)
def test_evidence_is_that_of_every_gate_and_node_image_by_image(case: Case) -> None:
    supernet, data = case.supernet(), tensor_data(3)
    table = build_routing_table(supernet, data, "val", NORMALIZATION, batch_size=2)
    for columns in table.gates:
        assert all(tuple(layout) == EVIDENCE_PARTS for layout in columns.layouts)
    spans = [span for columns in table.gates for layout in columns.layouts for span in layout.values()]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == table.evidence.shape[1]
    assert_evidence_equals_each_path_alone(table, supernet, data)


@pytest.mark.parametrize("case", GATED_CASES, ids=str)
def test_a_pooling_costs_the_elements_that_the_gate_reads(case: Case) -> None:
    supernet, data = case.supernet(), tensor_data(1)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    for route, subnet in enumerate(supernet.subnets):
        x = NORMALIZATION.apply(data.images("val"))
        for gate, branches in enumerate(table.tree.gates):
            with torch.no_grad():
                output = supernet.upto_gate(gate, x, subnet)
            assert table.gates[gate].pooling_madds[branches.node_of[route]] == output.gate_input.numel()
            x = output.features


def num_columns(table: RoutingTable) -> int:
    return table.evidence.shape[1]


def test_paths_that_need_too_many_columns_keep_only_the_hidden_vector_at_later_gates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    supernet, data = three_gate_supernet(), tensor_data(2)
    whole = build_routing_table(supernet, data, "val", NORMALIZATION)
    monkeypatch.setattr(evaluate, "MAX_EVIDENCE_COLUMNS", num_columns(whole))
    assert num_columns(build_routing_table(supernet, data, "val", NORMALIZATION)) == num_columns(whole)
    monkeypatch.setattr(evaluate, "MAX_EVIDENCE_COLUMNS", num_columns(whole) - 1)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    assert tuple(table.gates[0].layouts[0]) == EVIDENCE_PARTS
    assert {tuple(layout) for columns in table.gates[1:] for layout in columns.layouts} == {("hidden",)}
    hidden = [gate.hidden for gate in supernet.spec.gates]
    stem = supernet.subnets[0].widths[0]
    assert num_columns(table) == 3 * stem + hidden[0] + 2 * hidden[1] + 4 * hidden[2]
    assert table.gates[2].pooling_madds == whole.gates[2].pooling_madds
    with pytest.raises(KeyError, match="mean"):
        table.part("mean", 1, 0)
    assert_evidence_equals_each_path_alone(table, supernet, data)


@pytest.mark.parametrize("make", [lively_supernet, three_gate_supernet])
def test_pieces_join_to_the_table_built_at_once(make: Callable[[], Supernet]) -> None:
    supernet, data = make(), tensor_data(10)
    part = data.splits["val"]
    pieces = [
        replace(data, splits={"val": Batch(*(value[start:stop] for value in part))})
        for start, stop in ((0, 4), (4, 8), (8, 10))
    ]
    tables = [build_routing_table(supernet, piece, "val", NORMALIZATION, batch_size=4) for piece in pieces]
    joined = join_tables(tables)
    whole = build_routing_table(supernet, data, "val", NORMALIZATION, batch_size=4)
    assert joined.meta() == whole.meta()
    for name, value in whole.arrays().items():
        np.testing.assert_array_equal(joined.arrays()[name], value)


def test_batch_size_and_progress_do_not_change_the_table() -> None:
    supernet, data = small_supernet(), tensor_data(10)
    heard: list[tuple[int, int]] = []
    one = build_routing_table(supernet, data, "val", NORMALIZATION, batch_size=1)
    all_at_once = build_routing_table(
        supernet, data, "val", NORMALIZATION, batch_size=4, on_progress=lambda done, total: heard.append((done, total))
    )
    assert heard == [(4, 10), (8, 10), (10, 10)]
    np.testing.assert_array_equal(one.predicted, all_at_once.predicted)
    np.testing.assert_allclose(one.ce, all_at_once.ce, rtol=1e-4, atol=1e-5)


def test_static_accuracy_equals_the_tables_column() -> None:
    supernet, data = small_supernet(), tensor_data(30)
    table = build_routing_table(supernet, data, "val", NORMALIZATION)
    for route, subnet in enumerate(supernet.subnets):
        top1, top5 = subnet_accuracy(supernet, subnet, data, "val", NORMALIZATION, batch_size=7)
        assert top1 == pytest.approx(table.correct1[:, route].mean())
        assert top5 == pytest.approx(table.correct5[:, route].mean())
        assert table.top1()[route] == pytest.approx(top1)


@pytest.mark.parametrize("make", [lively_supernet, three_gate_supernet])
def test_a_table_survives_saving(tmp_path: Path, make: Callable[[], Supernet]) -> None:
    supernet = make()
    table = build_routing_table(supernet, tensor_data(7), "val", NORMALIZATION)
    path = tmp_path / "deep" / "val.safetensors"
    table.save(path)
    again = RoutingTable.load(path)
    assert again.meta() == table.meta()
    assert (again.tree, again.gates, again.num_classes) == (table.tree, table.gates, 10)
    for name, value in table.arrays().items():
        stored = again.arrays()[name]
        assert stored.dtype == value.dtype
        np.testing.assert_array_equal(stored, value)
    assert [item.name for item in path.parent.iterdir()] == ["val.safetensors"]


def test_arrays_have_the_promised_types() -> None:
    table = build_routing_table(small_supernet(), tensor_data(4), "val", NORMALIZATION)
    types = {name: str(value.dtype) for name, value in table.arrays().items()}
    assert types == {
        "image_ids": "int64",
        "labels": "int64",
        "madds": "int64",
        "ce": "float32",
        "predicted": "int64",
        "correct1": "bool",
        "correct5": "bool",
        "confidence": "float32",
        "margin": "float32",
        "entropy": "float32",
        "logits": "float16",
        "logit_classes": "int32",
        "evidence": "float32",
    }


def test_from_arrays_shares_memory_even_with_read_only_arrays() -> None:
    table = random_table()
    arrays = table.arrays()
    for value in arrays.values():
        value.flags.writeable = False  # as Ray's object store gives them
    again = RoutingTable.from_arrays(arrays, json.loads(json.dumps(table.meta())))
    assert all(np.shares_memory(again.arrays()[name], value) for name, value in arrays.items() if value.size)
    assert np.shares_memory(again.part("hidden"), table.evidence)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_in_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _flip_in_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _strip_metadata(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [_truncate, _flip_in_data, _flip_in_header, _empty, _strip_metadata, Path.unlink])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "val.safetensors"
    random_table().save(path)
    damage(path)
    with pytest.raises(CheckpointError, match=r"val\.safetensors"):
        RoutingTable.load(path)


def test_another_schema_version_is_refused() -> None:
    table = random_table()
    with pytest.raises(CheckpointError, match="schema version 99"):
        RoutingTable.from_arrays(table.arrays(), {**table.meta(), "schema_version": 99})


def test_a_table_of_the_first_release_is_refused_with_a_clear_message(tmp_path: Path) -> None:
    """It had one gate, whose columns were its `layout`, and evidence [N, 1, D]."""
    table = random_table()
    arrays = {**table.arrays(), "evidence": table.evidence[:, None]}
    meta = {"schema_version": 1, "split": "gate", "routes": list(table.routes), "layout": {}, "trunk_madds": 500}
    message = r"schema version 1, but this release reads 2"
    with pytest.raises(CheckpointError, match=message):
        RoutingTable.from_arrays(arrays, meta)
    path = tmp_path / "gate.safetensors"
    save_file(arrays, path, metadata={"routing_table": json.dumps({**meta, "sha256": _digest(arrays)})})
    with pytest.raises(CheckpointError, match=rf"gate\.safetensors: .*{message}.*delete its stage folder"):
        RoutingTable.load(path)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    table = random_table()
    with unchecked_shapes(), pytest.raises(CheckpointError, match=r"do not belong together: .*ce has shape"):
        RoutingTable.from_arrays({**table.arrays(), "ce": table.ce[:, :2]}, table.meta())
    incomplete = {name: value for name, value in table.arrays().items() if name != "ce"}
    with pytest.raises(CheckpointError, match="do not belong together"):
        RoutingTable.from_arrays(incomplete, table.meta())
    with unchecked_shapes(), pytest.raises(ValueError, match="madds, evidence or image_ids"):
        replace(table, madds=table.madds[:1])
    with unchecked_shapes(), pytest.raises(ValueError, match="logits do not fit"):
        replace(table, logits=table.logits[:, :2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree": []}, "at least one gate"),
        ({"tree": random_tree(3).to_json()}, "tree does not fit its 4 routes"),
        ({"gates": []}, "or its gates do not fit the tree"),
        ({"gates": [{"layouts": [], "pooling_madds": [48]}]}, "or its gates do not fit the tree"),
        ({"gates": [{"layouts": [{"hidden": [0, 6]}], "pooling_madds": []}]}, "or its gates do not fit the tree"),
        ({"gates": [{"layouts": [{"hidden": [0, 99]}], "pooling_madds": [48]}]}, "keep 99 columns"),
        ({"num_classes": None}, "do not belong together"),
    ],
)
def test_a_description_that_does_not_fit_the_arrays_is_refused(changes: Mapping[str, Any], message: str) -> None:
    table = random_table()
    with pytest.raises(CheckpointError, match=message):
        RoutingTable.from_arrays(table.arrays(), {**table.meta(), **changes})


def test_an_unknown_part_of_the_evidence_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="colour"):
        random_table().part("colour")
