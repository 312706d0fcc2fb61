"""The pictures of the report, one .png each, drawn on white so that they read the same in light and dark."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.measures import POINTS, Bin, CategoryFigures, Pair, Perturbed, Slice

OURS, OTHER, WRONG = "#0b6e4f", "#8a8f98", "#b3432b"
STYLES = ["--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))]
NAMED = 20  # categories up to which a confusion matrix shows its numbers


def confusion(path: Path, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Rows are true categories, columns predicted; colour is the share of the row."""
    matrix = np.array(counts, dtype=float)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    size = min(max(5.0, 0.45 * len(labels) + 2), 16)
    figure = Figure((size, size))
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Greens", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= NAMED:
        for (y, x), count in np.ndenumerate(matrix):
            if count:
                axes.text(
                    x,
                    y,
                    f"{count:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share[y, x] > 0.5 else "black",
                )
    _save(figure, path)


def reliability(path: Path, panels: Mapping[str, Sequence[Bin]]) -> None:
    """One panel a set of bins: how often it happened against how often it was said to."""
    figure = Figure((4.5 * len(panels), 4.5), layout="constrained")
    for number, (title, bins) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        filled = [b for b in bins if b["rows"]]
        total = sum(b["rows"] for b in filled)
        said, came = [b["predicted"] for b in filled], [b["happened"] for b in filled]
        axes.plot([0, 1], [0, 1], color=OTHER, linewidth=1)
        axes.plot(said, came, color=OURS, marker="o")  # type: ignore[arg-type]
        axes.bar(
            [(i + 0.5) / len(bins) for i in range(len(bins))],
            [b["rows"] / total for b in bins],
            0.08,
            color=OTHER,
            alpha=0.4,
        )
        axes.set(title=title, xlabel="predicted probability", ylabel="share that came true (bars: share of rows)")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    _save(figure, path)


def slices(path: Path, found: Sequence[Slice], xlabel: str) -> None:
    """Accuracy with one standard error by slice, the rows written below."""
    figure = Figure((max(5.0, 1.0 * len(found)), 3.5))
    axes = figure.add_subplot()
    errors = [s["standard_error"] for s in found]
    axes.bar(range(len(found)), [s["accuracy"] for s in found], yerr=errors, color=OURS, capsize=4)
    axes.set_xticks(range(len(found)), [f"{s['name']}\n{s['rows']} rows" for s in found], fontsize=8)
    axes.set(xlabel=xlabel, ylabel="accuracy (one standard error)", ylim=(0, 1))
    _save(figure, path)


def costs(path: Path, pair: Pair) -> None:
    """Quality against the share of calls to the strong model, for every score."""
    figure = Figure((7, 4.5))
    axes = figure.add_subplot()
    shares = np.linspace(0, 1, POINTS + 1)
    for number, (name, routed) in enumerate(pair["scores"].items()):
        label = f"{name} ({routed['apgr']['value']:.3f})"
        look = {"color": OURS, "linewidth": 2.5} if number == 0 else {"linestyle": STYLES[(number - 1) % len(STYLES)]}
        axes.plot(shares, routed["quality"], label=label, **look)  # type: ignore[arg-type]
    axes.set(xlabel=f"share of calls to {pair['strong']} (the rest: {pair['weak']})", ylabel="mean quality")
    axes.legend(title="score (APGR)", fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def robustness(path: Path, found: Mapping[str, Perturbed]) -> None:
    """Accuracy by perturbation with one standard error, the text as written first."""
    kept = {name: p for name, p in found.items() if p["accuracy"] is not None}
    figure = Figure((6, 0.45 * len(kept) + 1.2))
    axes = figure.add_subplot()
    accuracies = [p["accuracy"] or 0.0 for p in kept.values()]
    errors = [p["standard_error"] or 0.0 for p in kept.values()]
    axes.barh(list(kept), accuracies, xerr=errors, color=[OURS] + [OTHER] * (len(kept) - 1), capsize=4)
    axes.invert_yaxis()
    axes.set(xlabel="category accuracy (one standard error)", xlim=(0, 1))
    _save(figure, path)


def history(path: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Each figure by epoch; losses, which have no upper bound, in a panel of their own."""
    keys = [key for key in epochs[-1] if key != "epoch"]
    panels = [[key for key in keys if ("loss" in key) == loss] for loss in (True, False)]
    panels = [panel for panel in panels if panel]
    figure = Figure((4.5 * len(panels), 3.5), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for key in panel:
            axes.plot(range(1, len(epochs) + 1), [epoch.get(key, np.nan) for epoch in epochs], marker="o", label=key)
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    _save(figure, path)


def category(folder: Path, stem: str, labels: Sequence[str], found: CategoryFigures) -> dict[str, str]:
    """The pictures of one set's categories: what each shows by its file name."""
    drawn = {f"{stem}-confusion.png": "confusion matrix, true categories down, predicted across"}
    confusion(folder / f"{stem}-confusion.png", labels, [row[: len(labels)] for row in found["confusion"]])
    drawn[f"{stem}-reliability.png"] = "reliability diagram before and after temperature"
    panels = {"before temperature": found["bins_before"], "after": found["bins"]}
    reliability(folder / f"{stem}-reliability.png", panels)
    if found["by_length"]:
        drawn[f"{stem}-length.png"] = "accuracy by tokens"
        slices(folder / f"{stem}-length.png", found["by_length"], "tokens")
    return drawn


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None})
