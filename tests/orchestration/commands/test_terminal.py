"""What commands print for people."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.commands.terminal import say_mlflow, say_places
from orchestration.runs.folder import RunDir


@pytest.mark.parametrize(("data", "takes_photos"), [("image_folder", True), ("cifar10", True), ("digits", False)])
def test_the_end_of_a_launch_names_commands_that_can_be_pasted(
    data: str, takes_photos: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(Path("/my runs"), "mine")
    tracking = SimpleNamespace(mlflow=True, uri=None)
    results: Any = SimpleNamespace(run=run, config=SimpleNamespace(data=SimpleNamespace(name=data), tracking=tracking))
    say_places(results, [run.export_dir / "trial-0004"])
    say_mlflow(results)
    told = capsys.readouterr().out
    assert ("dsnet-orch predict '/my runs/mine/export/trial-0004' PHOTO..." in told) == takes_photos
    assert "dsnet-orch ui --runs '/my runs'" in told
