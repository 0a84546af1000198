"""Rows of points: builders, the schema, and the file after a crash."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsnet.errors import DataError, StorageError
from search.front.points import POINT_COLUMNS, control_points, gate_points, subnet_points, trial_name, validate_points
from search.front.points_file import load_points, points_frame, save_points


def make_rows():
    subnets = subnet_points(
        "val",
        ["subnet-00", "subnet-01"],
        np.array([0.8, 0.9]),
        np.array([5_000_000, 20_000_000]),
        top5=[0.95, 0.99],
        params=[1e6, 2e6],
        metrics={
            "balanced_top1": [0.75, float("nan")],
            "latency_ms": [1.5, float("nan")],
            "latency_ms.server": [0.4, 0.9],
            "latency_ms_batch64": [30.0, float("nan")],
        },
    )
    gates = gate_points(
        "val",
        [3, 12],
        [
            {"top1": 0.85, "madds_m": 9.0, "p95_madds_m": 20.0, "latency_ms.server": 0.5, "latency_ms_batch64": 30.0},
            {"top1": 0.88, "madds_m": 12.0, "latency_ms": np.nan, "latency_ms.server": np.nan},
        ],
        [{"gate.target": 0.3, "gate.sgs.strategy": "give_up", "gate.routing.first": 1}, {"gate.target": 0.5}],
        [True, False],
        [True, False],
    )
    gates[0]["supernet"] = "lr-0.1"
    controls = control_points("val", "cascade", [4e6, 8e6, 9e6], [np.nan, 0.82, 0.84])
    return [*subnets, *gates, *controls]


def test_builders_convert_units_and_leave_none_where_nothing_is_known():
    rows = make_rows()
    validate_points(rows)
    assert all(set(POINT_COLUMNS) <= set(row) for row in rows)
    assert rows[0]["madds_m"] == rows[0]["p95_madds_m"] == 5.0
    assert rows[0]["params_m"] == 1.0
    assert rows[1]["latency_ms"] is None
    assert rows[2]["name"] == trial_name(3) == "trial-0003"
    assert rows[2]["param.gate.sgs.strategy"] == "give_up"
    assert rows[3]["latency_ms"] is None
    assert (rows[1]["latency_ms.server"], rows[2]["latency_ms.server"]) == (0.9, 0.5)
    assert rows[2]["latency_ms_batch64"] == 30.0
    assert "latency_ms.server" not in rows[3]
    assert rows[0]["metric.balanced_top1"] == 0.75
    assert "metric.balanced_top1" not in rows[1], "NaN: the value is not known"
    assert "latency_ms_batch64" not in rows[1]
    assert [row["is_feasible"] for row in rows] == [None, None, True, False, None, None]
    assert [row["supernet"] for row in rows] == [None, None, "lr-0.1", None, None, None]
    assert [row["madds_m"] for row in rows[4:]] == [8.0, 9.0]  # no row where the control is undefined


def test_builders_refuse_columns_of_different_lengths():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        subnet_points("val", ["a", "b"], [0.5], [1.0, 2.0])


def test_rows_survive_the_file_exactly(tmp_path):
    rows = make_rows()
    save_points(tmp_path / "points.parquet", rows)
    assert load_points(tmp_path / "points.parquet") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["points.parquet"]


def test_no_rows_are_a_valid_file(tmp_path):
    save_points(tmp_path / "points.parquet", [])
    assert load_points(tmp_path / "points.parquet") == []
    assert list(points_frame([]).columns) == list(POINT_COLUMNS)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "points.parquet"
    save_points(path, make_rows())

    def full_disk(table, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(StorageError, match=r"points\.parquet: the disk is full"):
        save_points(path, make_rows()[:1])
    assert load_points(path) == make_rows()
    assert [entry.name for entry in tmp_path.iterdir()] == ["points.parquet"]


def test_frame_has_the_columns_in_order_and_keeps_whole_numbers_beside_missing_ones():
    frame = points_frame(make_rows())
    params = ["param.gate.routing.first", "param.gate.sgs.strategy", "param.gate.target"]
    assert list(frame.columns) == [
        *POINT_COLUMNS,
        "latency_ms.server",
        "latency_ms_batch64",
        "metric.balanced_top1",
        *params,
    ]
    assert frame["slot"].dtype == pd.Int64Dtype()
    assert frame.loc[2, "slot"] == 3
    assert frame.loc[2, "param.gate.routing.first"] == 1
    assert frame["slot"].isna().tolist() == [True, True, False, False, True, True]
    assert frame["top1"].dtype == float


def test_a_choice_that_mixes_types_becomes_text_and_ints_beside_floats_become_floats():
    rows = gate_points(
        "val",
        [0, 1],
        [{"top1": 0.5, "madds_m": 1.0}] * 2,
        [{"a": 1, "b": 1}, {"a": 0.5, "b": "auto"}],
        [True, True],
    )
    frame = points_frame(rows)
    assert frame["param.a"].tolist() == [1.0, 0.5]
    assert frame["param.b"].tolist() == ["1", "auto"]


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"kind": "teacher"}, "`kind` is 'teacher', but must be one of subnet, gate, control"),
        (0, {"split": "train"}, "`split` is 'train'"),
        (0, {"top1": 80.0}, "`top1` is 80.0, but must be a finite number of 0 or more and at most 1"),
        (0, {"top1": None}, "`top1` is missing"),
        (0, {"madds_m": float("nan")}, "`madds_m` is nan"),
        (0, {"latency_ms": -1.0}, "`latency_ms` is -1.0"),
        (0, {"flops": 1.0}, "the column `flops` is unknown"),
        (0, {"slot": 3}, "a subnet has neither `slot` nor `is_front`"),
        (0, {"param.gate.target": 0.1}, "a subnet has no parameters"),
        (2, {"slot": None}, "`slot` is None"),
        (2, {"is_front": None}, "`is_front` is None"),
        (2, {"is_feasible": None}, "`is_feasible` is None"),
        (2, {"is_feasible": False}, "an infeasible trial cannot be on the front"),
        (2, {"latency_ms.server": -1.0}, "`latency_ms.server` is -1.0"),
        (2, {"supernet": 3}, "`supernet` is 3"),
        (2, {"param.gate.target": [1]}, r"`param.gate.target` is \[1\]"),
        (1, {"name": "subnet-00"}, "The subnet 'subnet-00' has 2 points on val"),
    ],
)
def test_a_row_that_breaks_the_schema_is_named_and_nothing_is_written(tmp_path, index, change, message):
    rows = make_rows()
    rows[index] = rows[index] | change
    with pytest.raises(ValueError, match=message):
        save_points(tmp_path / "points.parquet", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_damaged_or_foreign_file_is_a_data_error_that_names_it(tmp_path):
    path = tmp_path / "points.parquet"
    with pytest.raises(DataError, match=r"points\.parquet: there is no such"):
        load_points(path)
    save_points(path, make_rows())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"points\.parquet: not a readable"):
        load_points(path)
    pq.write_table(pa.table({"top1": [0.5]}), path)
    with pytest.raises(DataError, match=r"points\.parquet: points schema version none"):
        load_points(path)
    old = pq.read_table(write_old(path)).replace_schema_metadata({b"dsnet.points": b"1"})
    pq.write_table(old, path)
    with pytest.raises(DataError, match="version 1, but this release reads 2; `dsnet-orch report RUN` writes"):
        load_points(path)


def write_old(path):
    """A file as the release before wrote it: without the columns that came later."""
    save_points(path, make_rows())
    pq.write_table(pq.read_table(path).drop_columns(["is_feasible", "supernet"]), path)
    return path


def test_subnets_of_one_name_may_come_from_several_supernets():
    rows = [{**row, "supernet": origin} for origin in ("a", "b") for row in subnet_points("val", ["w"], [0.9], [2e6])]
    validate_points(rows)
    with pytest.raises(ValueError, match="'w' has 2 points on val"):
        validate_points([*rows, rows[0]])
