"""Figures of the routes that the routers of the front take: histograms per router, and per class
for one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from dashboards.theme import INK, colour_bar, cost_colours, dressed, note, plain
from dsnet.wording import plural

ROW_HEIGHT_PX = 30
MAX_ROWS_PX = 1000
"""Maximum height of the rows together; beyond it more classes make the rows thinner."""


@dataclass(frozen=True)
class RoutesInfo:
    """Numbers of images per router and route, and per class if labels were given."""

    split: str
    num_images: int
    routes: tuple[str, ...]
    madds_m: tuple[float, ...]
    """MAdds of each route, in millions."""
    gates: tuple[str, ...]
    """Names of the front's routers, cheapest first."""
    counts: npt.NDArray[np.int64]
    """int64 [gates, routes]; each row sums to `num_images`."""
    classes: tuple[str, ...] = ()
    class_counts: npt.NDArray[np.int64] | None = None
    """int64 [gates, classes, routes]; None without labels."""


def routes_info(
    chosen: Mapping[str, npt.NDArray[np.integer]],
    routes: Sequence[str],
    madds_m: Sequence[float],
    split: str,
    labels: npt.NDArray[np.integer] | None = None,
    classes: Sequence[str] = (),
) -> RoutesInfo:
    """Build the info from the routes that each router chose.

    Args:
        chosen: router name -> route index per image, int [N] in 0..K-1, for the same N images.
        routes: names of the K routes, in the order of the indices.
        madds_m: MAdds of each route, in millions.
        split: the split of the images.
        labels: class index per image, int [N]; None leaves out the counts per class.
        classes: names of the classes; required with `labels`.

    Raises:
        ValueError: a route index is outside 0..K-1, or the routers have different numbers of
            images.
    """
    sizes = {len(route) for route in chosen.values()}
    if len(sizes) > 1:
        raise ValueError(f"every gate must route the same images, but their numbers differ: {sorted(sizes)}")
    cost = np.asarray(madds_m, dtype=float)
    gates = sorted(chosen, key=lambda name: (float(cost[chosen[name]].mean()) if len(chosen[name]) else 0.0, name))
    rows = [_histogram(chosen[gate], len(routes)) for gate in gates]
    class_rows = None
    if labels is not None:
        class_rows = np.array(
            [[_histogram(chosen[g][labels == c], len(routes)) for c in range(len(classes))] for g in gates],
            dtype=np.int64,
        ).reshape(len(gates), len(classes), len(routes))
    return RoutesInfo(
        split=split,
        num_images=sizes.pop() if sizes else 0,
        routes=tuple(routes),
        madds_m=tuple(float(m) for m in madds_m),
        gates=tuple(gates),
        counts=np.array(rows, dtype=np.int64).reshape(len(gates), len(routes)),
        classes=tuple(classes) if labels is not None else (),
        class_counts=class_rows,
    )


def _histogram(route: npt.NDArray[np.integer], num_routes: int) -> npt.NDArray[np.int64]:
    if route.size and not 0 <= int(route.min()) <= int(route.max()) < num_routes:
        raise ValueError(f"route indices must lie in 0..{num_routes - 1}, got {int(route.min())}..{int(route.max())}")
    return np.bincount(route, minlength=num_routes).astype(np.int64)


def routes_figure(info: RoutesInfo) -> go.Figure:
    """Figure with a bar per router: the share of images (%) that takes each route."""
    figure = go.Figure()
    order = np.argsort(np.asarray(info.madds_m), kind="stable")
    gates = [plain(gate) for gate in info.gates]
    for colour, k in zip(cost_colours(len(order)), order, strict=True):
        taken = info.counts[:, k]
        figure.add_trace(
            go.Bar(
                orientation="h",
                y=gates,
                x=[100 * int(n) / info.num_images for n in taken],
                name=f"{plain(info.routes[k])} ({info.madds_m[k]:.3g} M)",
                marker={"color": colour, "line": {"color": "white", "width": 0.5}},
                text=[
                    f"<b>{gate}</b><br>{plain(info.routes[k])}: {plural(int(n), 'image')} of {info.num_images:,}"
                    for gate, n in zip(gates, taken, strict=True)
                ],
                textposition="none",
                hoverinfo="text",
            )
        )
    if not info.gates:
        note(figure, "no router on the front yet")
    figure.update_layout(barmode="stack", bargap=0.25, legend={"traceorder": "normal"})
    figure.update_xaxes(title_text="share of images (%)", range=[0, 100])
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    subtitle = (
        f"{info.split} (n = {info.num_images:,}); routers from cheap to costly, routes from light (cheap) to dark"
    )
    height_px = max(320, 250 + ROW_HEIGHT_PX * len(gates))
    return dressed(figure, "Shares of the routes, by router on the front", subtitle, height_px)


def class_routes_figure(info: RoutesInfo, gate: str) -> go.Figure:
    """Heat map of one router: the share (%) of each class's images that takes each route.

    Raises:
        ValueError: `gate` is not in the info, or the info has no classes.
    """
    if info.class_counts is None:
        raise ValueError("the info was made without labels: pass `labels` and `classes` to routes_info")
    if gate not in info.gates:
        raise ValueError(f"unknown gate {gate!r}; known: {', '.join(info.gates) or 'none'}")
    order = np.argsort(np.asarray(info.madds_m), kind="stable")
    counts = info.class_counts[info.gates.index(gate)][:, order]
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = go.Figure(
        go.Heatmap(
            z=shares.tolist(),
            x=[f"{plain(info.routes[k])}<br>{info.madds_m[k]:.3g} M" for k in order],
            y=[plain(name) for name in info.classes],
            zmin=0,
            zmax=100,
            colorscale="Blues",
            xgap=1,
            ygap=1,
            customdata=counts.tolist(),
            hovertemplate="class %{y}, %{x}<br>%{z:.1f} % (%{customdata} images)<extra></extra>",
            colorbar=colour_bar("share of the class (%)") | {"lenmode": "pixels", "len": 240, "y": 1, "yanchor": "top"},
        )
    )
    figure.update_xaxes(type="category", showgrid=False, tickfont={"color": INK})
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, title_text="class")
    height_px = max(360, 180 + min(24 * len(info.classes), MAX_ROWS_PX))
    subtitle = f"{gate} on {info.split} (n = {info.num_images:,}); each row sums to 100 %"
    return dressed(figure, "Routes per class", subtitle, height_px)
