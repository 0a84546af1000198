"""Static PNG of the front (accuracy against cost), drawn without a browser."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from dashboards.front import Frame, FrontInfo, FrontPanel, Point, front_frame
from dashboards.theme import BLUE, GRID, INK, MUTED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES = 6.2, 3.3
DOTS_PER_INCH: Final = 100
"""Resolution; the picture is 620 pixels wide, which fits beside MLflow's column of facts."""
FONT_POINTS: Final = 8.0


def front_picture(info: FrontInfo) -> bytes:
    """Draw the panels of a front side by side.

    Args:
        info: the same as for the interactive figure; its controls are left out.

    Returns:
        The bytes of a PNG.
    """
    # Imported here because it is slow; not pyplot, which has global state and may look for a
    # display.
    with _away_from_home():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    panels, frame = info.panels, front_frame(info)
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _draw(axes, panel, frame)
    figure.axes[0].set_ylabel("top-1 accuracy (%)", fontsize=FONT_POINTS, color=INK)
    if figure.axes[0].has_data():
        figure.axes[0].legend(loc="lower right", frameon=False, fontsize=FONT_POINTS, labelcolor=INK)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


@contextmanager
def _away_from_home() -> Iterator[None]:
    """Context manager for the first import of matplotlib, which makes a cache of fonts: in a
    temporary folder, unless the user names one. The home folder need not be writable, and stays as
    it is."""
    variable = "MPLCONFIGDIR"
    if variable in os.environ or "matplotlib" in sys.modules:
        yield
        return
    with TemporaryDirectory(prefix="matplotlib-") as folder:
        os.environ[variable] = folder
        try:
            yield
        finally:
            del os.environ[variable]


def _draw(axes: Axes, panel: FrontPanel, frame: Frame) -> None:
    others = [point for point in panel.dynamic if not point.is_front]
    line = panel.static_line
    if line.top1:
        axes.plot(line.madds_m, [100 * top1 for top1 in line.top1], color=INK, linewidth=1.2, label="static line")
    _scatter(axes, others, "other trials", color=SKY, marker="o", s=10, alpha=0.6, linewidths=0)
    _scatter(axes, panel.static, "static sub-networks", color=INK, marker="s", s=24)
    _scatter(axes, panel.front, "front of the routers", color=BLUE, marker="o", s=30, edgecolors="white")
    axes.set_title(f"{panel.split} (n = {panel.num_images:,})", fontsize=FONT_POINTS + 1, color=INK)
    axes.set_xlabel("mean MAdds per image (M)", fontsize=FONT_POINTS, color=INK)
    axes.set_xlim(*frame.madds_m)
    axes.set_ylim(*frame.top1_percent)
    axes.grid(color=GRID)
    axes.tick_params(colors=MUTED, labelsize=FONT_POINTS)
    axes.spines[["top", "right"]].set_visible(False)


def _scatter(axes: Axes, points: Sequence[Point], label: str, **style: Any) -> None:
    if points:
        axes.scatter([p.madds_m for p in points], [100 * p.top1 for p in points], label=label, zorder=3, **style)
