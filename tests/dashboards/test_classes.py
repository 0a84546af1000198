"""The table of accuracies within classes."""

from __future__ import annotations

import re

import pytest

from dashboards import classes
from dashboards.classes import ClassesInfo, classes_table

INFO = ClassesInfo("val", "trial-0003", ("crack", "free <1>", "fray"), (10, 80, 5), (0.5, 0.9, 0.4), (0.6, 0.95, 0.2))


def rows(html: str) -> list[list[str]]:
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html)]


def test_the_lowest_class_of_the_router_comes_first_and_the_mean_last() -> None:
    assert rows(classes_table(INFO)) == [
        ["Class", "Images", "Widest (%)", "trial-0003 (%)"],
        ["fray", "5", "40.0", "20.0"],
        ["crack", "10", "50.0", "60.0"],
        ["free &lt;1&gt;", "80", "90.0", "95.0"],
        ["mean over classes", "95", "60.0", "58.3"],
    ]


def test_without_a_router_the_widest_sub_network_is_shown_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "MAX_CLASSES", 1)
    info = ClassesInfo("val", "", INFO.classes, INFO.num_images, INFO.widest)
    assert [row[0] for row in rows(classes_table(info))] == ["Class", "fray", "mean over classes"]


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one value per class"):
        ClassesInfo("val", "", ("a", "b"), (1, 2), (0.5,))
