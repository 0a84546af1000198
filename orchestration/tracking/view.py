"""The page of MLflow that shows a sweep's points: a prepared chart view, kept as a tag of the
experiment, and its link.

MLflow's page stores a shared view as JSON in an experiment's tag, under a key that the link names.
The tag written here equals that of MLflow's button "Share": a filter, the order of the rows, and
the charts. Without it the page shows no chart of the points at first.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final
from urllib.parse import urlencode

SUPERSEDED: Final = "superseded"
"""Tag of a row that belongs to earlier settings of its sweep, with the value `true`; also the role
of such a row."""
TAG_PREFIX: Final = "mlflow.sharedViewState."
MODEL_TRAINING: Final = "workflowType=machine_learning"
"""Part of a link that opens MLflow's view for model training instead of the one for GenAI."""
EXPERIMENTS_PATH: Final = f"/#/experiments?{MODEL_TRAINING}"
"""The link to the list of experiments, without the server's address."""
POINTS: Final = "Accuracy against cost"
CARD_HEIGHT_PX: Final = 520
CHARTS: Final = (("val", "madds_m", "top1"), ("test", "test/madds_m", "test/top1"))
"""(split, horizontal axis, vertical axis) of each chart; the axes' titles are names of metrics."""
COLLAPSED: Final = ("test", "Model metrics", "System metrics")
"""Sections of MLflow's automatic bar charts, one chart per metric; they are closed at first. The
last two have names that MLflow gives."""


def view_tag(uid: str) -> str:
    """The experiment's tag that holds the view of a sweep."""
    return TAG_PREFIX + _key(uid)


def view_path(experiment_id: str, uid: str) -> str:
    """The link to the view of a sweep, without the server's address."""
    query = urlencode({"compareRunsMode": "CHART", "viewStateShareKey": _key(uid)})
    return f"{runs_path(experiment_id)}&{query}"


def runs_path(experiment_id: str) -> str:
    """The link to the list of an experiment's runs, without the server's address."""
    return f"/#/experiments/{experiment_id}/runs?{MODEL_TRAINING}"


def points_view(uid: str, *, is_outermost: bool) -> str:
    """The view of a sweep's points, those on the front first: static sub-networks and trials. The
    teacher is left out, because it cannot be chosen, and so are rows of earlier settings.

    Args:
        uid: uid of the sweep's own row.
        is_outermost: a sweep of its own, or one of several supernets with all of their rows; else
            it is one of those supernets.
    """
    tag = "root" if is_outermost else "sweep"
    view: dict[str, Any] = {
        "searchFilter": f"tags.{tag} = '{uid}' AND tags.role != 'teacher' AND tags.role != '{SUPERSEDED}' AND metrics.madds_m > 0",
        "orderByKey": "tags.`role`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": ["tags.`role`", *(f"metrics.`{name}`" for name in ("top1", "madds_m"))],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [_scatter(*chart) for chart in CHARTS],
        "compareRunSections": [
            _section(POINTS, is_open=True) | {"columns": 1, "cardHeight": CARD_HEIGHT_PX},
            *(_section(name, is_open=False) for name in COLLAPSED),
        ],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }
    return json.dumps(view)


def _scatter(split: str, cost: str, accuracy: str) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "uuid": f"points-{split}",
        "metricSectionId": POINTS,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 100,
        "xaxis": {"key": cost, "type": "METRIC"},
        "yaxis": {"key": accuracy, "type": "METRIC"},
    }


def _section(name: str, *, is_open: bool) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": is_open, "isReordered": True, "deleted": False, "isGenerated": False}


def _key(uid: str) -> str:
    return f"points-{hashlib.sha256(uid.encode()).hexdigest()[:12]}"
