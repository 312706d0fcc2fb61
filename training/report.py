"""A run's figures for people: a table for the terminal; report.html, its pictures and model_card.md for later."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from training import plots
from training.measures import Estimate, Metrics, Pair, SetFigures, plain

TEMPLATES = Path(__file__).parent / "templates"


def write_report(metrics: Metrics, folder: Path) -> Path:
    """Write report.html, its .png files and model_card.md into `folder`, which exists; return the page's path.

    What `metrics` lacks is left out. The same metrics give the same files.
    """
    shown = plain(metrics)
    shown = {key: shown.get(key) for key in Metrics.__annotations__} | {"ours": ours(metrics)}
    images = dict(_drawn(metrics, folder))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": percent, "interval": interval, "file": stem, "cell": cell}
    for name in ("report.html", "model_card.md"):
        text = environment.get_template(f"{name}.j2").render(**shown, images=images)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "report.html"


def table(metrics: Metrics) -> str:
    """The figures of each set and pair of models with their baselines, as lines to print."""
    parts = [part for found in metrics.get("sets", []) for part in _set_lines(found, ours(metrics))]
    for pair in metrics.get("pairs", []):
        parts += ["", *_pair_lines(pair)]
    return "\n".join(parts).strip("\n")


def ours(metrics: Metrics) -> str:
    """What our own row is called."""
    return metrics.get("ours", "this model")


def figure(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` decimals; a dash for what there is none of."""
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"  # noqa: RUF001


def interval(found: Estimate | None) -> str:
    """`0.840 [0.819, 0.861]`."""
    return figure(None) if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def stem(name: str) -> str:
    """`name` as part of a file name."""
    return re.sub(r"[^\w.]+", "-", name.casefold()).strip("-.") or "unnamed"


def cell(text: Any) -> str:
    """`text` fit for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|")


def _drawn(metrics: Metrics, folder: Path) -> Iterator[tuple[str, str]]:
    """Draw every picture there are figures for; each one's file name, and what it shows."""
    for found in metrics.get("sets", []):
        if category := found["category"]:
            yield from plots.category(folder, stem(found["name"]), found["labels"], category).items()
        if complexity := found["complexity"]:
            name = f"{stem(found['name'])}-complexity.png"
            plots.reliability(folder / name, {"complexity": complexity["bins"]})
            yield name, "reliability diagram of the complexity"
    for pair in metrics.get("pairs", []):
        name = f"routing-{stem(pair['set'])}-{stem(pair['weak'])}-{stem(pair['strong'])}.png"
        plots.costs(folder / name, pair)
        yield name, f"mean quality by share of calls to {pair['strong']}"
    for set_name, perturbed in metrics.get("robustness", {}).items():
        if any(found["accuracy"] is not None for found in perturbed.values()):
            plots.robustness(folder / f"{stem(set_name)}-robustness.png", perturbed)
            yield f"{stem(set_name)}-robustness.png", "category accuracy by perturbation of the text"
    if epochs := metrics.get("history"):
        plots.history(folder / "history.png", epochs)
        yield "history.png", "figures on the validation rows by epoch"


def _set_lines(found: SetFigures, name: str) -> Iterator[str]:
    category, complexity = found["category"], found["complexity"]
    if category:
        title = f"{found['name']}, {category['rows']} rows: category"
        rows = [
            (other, interval(b["accuracy"]), figure(b["standard_error"]), interval(b["macro_f1"]), "")
            for other, b in category["baselines"].items()
        ]
        ece = f"{category['ece']:.3f} (before temperature {category['ece_before']:.3f})"
        last = interval(category["accuracy"]), figure(category["standard_error"]), interval(category["macro_f1"]), ece
        yield from ("", *_aligned([(title, "accuracy", "std err", "macro-F1", "ECE"), *rows, (name, *last)]))
    if complexity:
        title = f"{found['name']}, {complexity['rows']} rows: complexity"
        others = [(other, figure(auc), "", "") for other, auc in complexity["baselines"].items()]
        own = name, figure(complexity["auc"]), figure(complexity["accuracy"]), figure(complexity["ece"])
        yield from ("", *_aligned([(title, "AUC", "accuracy", "ECE"), *others, own]))


def _pair_lines(pair: Pair) -> Iterator[str]:
    yield (
        f"{pair['set']}, {pair['rows']} rows: {pair['weak']} ({pair['weak_quality']:.3f}) "
        f"to {pair['strong']} ({pair['strong_quality']:.3f})"
    )
    rows = [
        (name, interval(r["apgr"]), interval(r["lead"]), percent(r["calls_for_half"]), percent(r["calls_for_most"]))
        for name, r in pair["scores"].items()
    ]
    head = "score", "APGR", "our lead", "calls for 50 %", "calls for 80 %"
    yield from _aligned([head, *rows[1:], rows[0]])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, as wide as their widest cell, empty ends cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
