"""The picture of a run: error against hits, a panel for each view, on white so that it reads in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from bench.cache.measures import interval
from bench.cache.report import View
from bench.cache.systems import PLAIN

STATIC = "#8a8f98"
COLOURS = {"plain": "#8a8f98", "verified": "#0b6e4f", "online": "#1b4f9c", "gptcache": "#b3432b"}
MARKERS = {"plain": "s", "verified": "o", "online": "D", "gptcache": "^"}
OTHER, OTHER_MARKER = "#6b3fa0", "v"
COLUMNS = 3
TICKS = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)


def draw(path: Path, views: Sequence[View]) -> None:
    """Write the picture of `views`, of which there is at least one."""
    columns = min(COLUMNS, len(views))
    lines = math.ceil(len(views) / columns)
    figure = Figure((5.2 * columns, 4.4 * lines + 0.6), layout="constrained")
    for number, view in enumerate(views, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _curve(axes, view)
        _points(axes, view)
        axes.set(title=view.words, xlabel="hits, share of the requests", ylabel="wrong, share of the hits")
        axes.set_yscale("function", functions=(_root, np.square))  # small errors are what is looked for
        axes.set(xlim=(0, None), ylim=(0, 1), yticks=TICKS)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
    drawn = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn), fontsize=8)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def _curve(axes: Axes, view: View) -> None:
    """All static thresholds."""
    drawn = [(counts.hit_rate, counts.error) for counts in view.curve if counts.error is not None]
    axes.plot(
        *zip(*drawn, strict=True) if drawn else ([], []), color=STATIC, linewidth=1.5, label="any static threshold"
    )


def _points(axes: Axes, view: View) -> None:
    """A system each, with the intervals of both shares."""
    for name, result in view.found.results.items():
        counts = view.count(result.tally)
        if counts.error is None:
            continue
        kind = name.split("-")[0]
        x, y = counts.hit_rate, counts.error
        axes.errorbar(
            x,
            y,
            xerr=_arms(x, interval(counts.hits, counts.requests)),
            yerr=_arms(y, interval(counts.wrong, counts.hits)),
            fmt=MARKERS.get(kind, OTHER_MARKER),
            color=COLOURS.get(kind, OTHER),
            capsize=3,
            label=kind if (is_plain := name in PLAIN) else result.name,
        )
        if is_plain:
            axes.annotate(f"{PLAIN[name]:.2f}", (x, y), textcoords="offset points", xytext=(6, 4), fontsize=7)


def _arms(value: float, ends: tuple[float, float]) -> list[list[float]]:
    low, high = ends
    return [[value - low], [high - value]]


def _root(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(errors, 0))
