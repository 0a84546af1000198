"""Commands about runs with thousands of trials: they import what they need, and take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import in_fresh_process
from benchmarks.large_study import Grown, begin, command_seconds, grow
from tests.hostile import REPOSITORY
from tests.orchestration.samples import Finished

NUM_TRIALS = 10_000
SLACK = 3.0
"""Factor by which a slow machine may miss the goals of the benchmark."""
HEAVY = ("torch", "ray", "mlflow", "plotly", "pandas", "pyarrow")
CODE = (
    "import sys\nfrom dsnet_orch import main\n"
    "for command in (['status'], ['trials'], ['trials', '--json'], ['pareto'], ['pareto', '--json'], ['status', '--json']):\n"
    "    sys.argv = ['dsnet-orch', *command, sys.argv[-1]]\n"
    "    try:\n        main()\n    except SystemExit as done:\n        assert not done.code, command\n"
    f"    loaded = [name for name in {HEAVY} if name in sys.modules]\n"
    "    assert not loaded, (command, loaded)\n"
)


def test_status_trials_and_pareto_import_nothing_heavy(finished: Finished) -> None:
    """With torch alone, each would take a second longer."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(finished.run.path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_ten_thousand_trials_are_searched_and_shown_within_their_goals(tmp_path: Path) -> None:
    sweep = begin(tmp_path, ("sampler.name=random",))
    grown: Grown = in_fresh_process(grow, sweep, NUM_TRIALS, ("sampler.name=random",))
    assert grown.search_kb <= 20.0
    middle = len(grown.marks) // 2
    assert grown.engine_ms(middle, -1) <= SLACK * grown.engine_ms(0, middle)
    for command in (("status",), ("trials",), ("pareto",)):
        assert command_seconds(tmp_path, command)[1] <= SLACK * 2.0, command
    report = tmp_path / "runs" / "large" / "report.html"
    assert report.stat().st_size < 8e6
