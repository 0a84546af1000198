"""The arithmetic behind the table of large studies."""

from __future__ import annotations

import pytest

from benchmarks.large_study import SWEEP, Grown, Mark
from orchestration.config.loading import load_config


def test_the_engine_is_charged_with_what_the_trials_did_not_take() -> None:
    marks = (Mark(500, 10.0, 4.0, 300.0), Mark(1000, 13.0, 6.0, 304.0), Mark(1500, 17.0, 8.0, 310.0))
    grown = Grown(marks, 20.0, 400.0)
    assert grown.engine_ms(0, 1) == pytest.approx(2.0)
    assert grown.engine_ms(1, -1) == pytest.approx(4.0)
    assert grown.search_kb == pytest.approx(10 * 1.048576e6 / 1e3 / 1000)


def test_the_sweep_of_the_benchmark_is_valid(tmp_path) -> None:
    (tmp_path / "large.yaml").write_text(SWEEP)
    assert load_config(tmp_path / "large.yaml", known_models=("ds_tiny",)).config.name == "large"
