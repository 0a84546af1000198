"""The channel groups that `plan --all` lists."""

from __future__ import annotations

import pytest

from dsnet.families import layout
from dsnet.import_path import ALLOW_IMPORTS
from orchestration.commands.plan_view import group_layers
from tests.dsnet.cases import KERNEL_OPTIONS, KERNELS
from tests.dsnet.samples import task


def test_the_size_of_a_kernel_is_listed_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_IMPORTS, "1")
    spec = layout(KERNELS, task(), KERNEL_OPTIONS).spec
    listed = {group.name: (group.unit, layers) for group, layers in group_layers(spec)}
    assert listed["first.kernel"] == ("pixel", ("first",))
    assert listed["third.kernel"] == ("pixel", ("third",))
    assert listed["wide_0"][0] == "channel"
    assert {"wide_0", "second", "third", "last"} <= set(listed["wide_0"][1])
