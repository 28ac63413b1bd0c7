"""The figures of a report, as SVG that takes its colours for text and lines from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dlm_lightning.callbacks.weight_drift import COLUMNS, OUTSIDE
from dlm_lightning.evaluation import ONE_BY_ONE
from dlm_lightning.report.content import Arm, Run
from dlm_lightning.tally import NAMES

INK, GRID, PAPER = "#010203", "#040506", "#070809"  # stand-ins: the page's colours take their places
REPLACED = {INK: "currentColor", GRID: "var(--line)", PAPER: "var(--paper)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "grid.color": GRID,
    "axes.edgecolor": GRID,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}
WIDTH = 11.1  # inches, of every figure, so that letters are of one size on the page
Rate = Callable[[Run, str], float | None]
Series = Callable[[Run], Sequence[tuple[float, float]]]


class Drawn(NamedTuple):
    """A figure's title, what it says, and its SVG."""

    title: str
    note: str
    svg: Markup


def all_of(arms: Sequence[Arm]) -> list[Drawn]:
    """Every figure that has something in it."""
    makers = (curves, drift_curves, heat_maps, drift_and_accuracy, frontier, profiles)
    with matplotlib.rc_context(STYLE):
        return [drawn for maker in makers if (drawn := maker(arms))]


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _drawn(title: str, note: str, figure: Figure) -> Drawn:
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # names inside are this figure's own, and the same next time
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, color in REPLACED.items():
        svg = svg.replace(stand_in, color)
    svg = re.sub(r'<svg ([^>]*?)height="[\d.]+pt"', r"<svg \1", svg, count=1)
    return Drawn(title, note, Markup(svg))  # matplotlib escapes what it writes


def _lines(axes, arms: Sequence[Arm], series: Series) -> bool:
    """The mean over seeds, with their range, of each arm at the steps that all its seeds have."""
    drawn = False
    for arm in arms:
        found = [dict(values) for run in arm.runs if (values := series(run))]
        steps = sorted(set.intersection(*map(set, found))) if found else []
        if not steps:
            continue
        values_RS = np.array([[of_run[step] for step in steps] for of_run in found])
        one = len(steps) == 1
        axes.plot(steps, values_RS.mean(0), "o" if one else "-", color=arm.color, label=arm.title, linewidth=1.8)
        if len(found) > 1:
            axes.fill_between(steps, values_RS.min(0), values_RS.max(0), color=arm.color, alpha=0.2, linewidth=0)
        drawn = True
    return drawn


def _panels(arms: Sequence[Arm], panels: Sequence[tuple[str, str, Series]], xlabel: str = "step") -> Figure | None:
    figure = _figure(3.3)
    drawn = False
    for number, (title, label, series) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        drawn |= _lines(axes, arms, series)
        axes.set(title=title, xlabel=xlabel, ylabel=label)
        _tidy(axes)
    _legend(figure, arms)
    return figure if drawn else None


def _tidy(axes) -> None:
    """Few enough ticks that none runs into another."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=axes.get_xlabel() == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _legend(figure: Figure, arms: Sequence[Arm]) -> None:
    by_name: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        by_name |= dict(zip(names, handles, strict=True))
    if by_name:
        names = list(by_name)
        handles = [by_name[name] for name in names]
        figure.legend(handles, names, loc="outside lower left", ncols=min(3, len(names)))


def curves(arms: Sequence[Arm]) -> Drawn | None:
    """Training loss and validation over the steps."""
    panels: list[tuple[str, str, Series]] = [
        ("own training loss", "nats per token", lambda run: _smooth(run.series("train/loss"))),
        ("own NELBO, validation", "nats per token", lambda run: run.series("val/nelbo")),
        ("next-token NLL, source's readout", "nats per token", lambda run: run.series("val/ar_nll")),
    ]
    figure = _panels(arms, panels)
    note = (
        "Lines are means over seeds, bands their range. Training losses are weighted as each recipe says and do not "
        "compare; own NELBOs are under each pattern's own blocks."
    )
    return _drawn("Curves", note, figure) if figure else None


def _smooth(values: Sequence[tuple[int, float]], parts: int = 40) -> list[tuple[int, float]]:
    """Means over up to so many stretches of equally many points."""
    size = max(1, len(values) // parts)
    chunks = [values[n : n + size] for n in range(0, len(values), size)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def drift_curves(arms: Sequence[Arm]) -> Drawn | None:
    """Weight drift over the steps."""
    panels: list[tuple[str, str, Series]] = [
        ("attention", "‖ΔW‖/‖W₀‖", lambda run: run.drift_series("attention", "rel_fro")),
        ("FFN", "", lambda run: run.drift_series("FFN", "rel_fro")),
        ("attention and FFN", "mean |ΔW|", _mean_abs),
    ]
    figure = _panels(arms, panels)
    return _drawn("Weight drift", "From the AR source, over the steps.", figure) if figure else None


def _mean_abs(run: Run) -> list[tuple[int, float]]:
    attention, ffn = (dict(run.drift_series(module, "mean_abs")) for module in ("attention", "FFN"))
    return [(step, (attention[step] + ffn[step]) / 2) for step in sorted(attention.keys() & ffn.keys())]


def heat_maps(arms: Sequence[Arm]) -> Drawn | None:
    """‖ΔW‖/‖W₀‖ by layer and module, side by side on one scale."""
    shown = [(arm, cells) for arm in arms if (cells := _cells(arm))]
    if not shown:
        return None
    columns = [
        name
        for name in COLUMNS
        if any(name == group for _, cells in shown for layer, group in cells if layer is not None)
    ]
    layers = sorted({layer for _, cells in shown for layer, _ in cells if layer is not None})
    outside = [g for g in OUTSIDE if any((None, g) in cells for _, cells in shown)]
    top = max(value for _, cells in shown for value in cells.values()) or 1.0
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    lines = len(layers) + len(outside)
    figure = _figure(down * (1.0 + 0.3 * lines))
    for number, (arm, cells) in enumerate(shown, 1):
        axes = figure.add_subplot(down, across, number)
        inside = [[cells.get((layer, group), np.nan) for group in columns] for layer in layers]
        map_LG = np.array(inside + [[cells.get((None, group), np.nan)] * len(columns) for group in outside])
        image = axes.imshow(map_LG, norm=PowerNorm(0.5, 0, top), cmap="viridis", aspect="auto", interpolation="nearest")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(arm.title if len(arm.title) < 30 else f"{arm.title[:29]}…")
        axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) * across > 16 else 0)
        names = [f"layer {layer}" for layer in layers] + [OUTSIDE[group] for group in outside]
        axes.set_yticks(range(lines), names if (number - 1) % across == 0 else [""] * lines)
        axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8)
    bar.outline.set_visible(False)
    note = "‖ΔW‖/‖W₀‖, mean over seeds, one scale for all arms. What belongs to no layer is a band across all columns."
    return _drawn("Drift by layer and module", note, figure)


def _cells(arm: Arm) -> dict[tuple[int | None, str], float]:
    """Means over seeds of rel_fro pooled over the matrices of a layer's module, weighted by their numbers."""
    sums: dict[tuple[int | None, str], list[tuple[float, int]]] = {}
    for run in arm.runs:
        for row in run.drift:
            if row["name"] is not None and row["metric"] == "rel_fro" and np.isfinite(row["value"]):
                sums.setdefault((row["layer"], row["group"]), []).append((row["value"], row["numel"]))
    return {cell: sum(v * n for v, n in values) / sum(n for _, n in values) for cell, values in sums.items()}


def drift_and_accuracy(arms: Sequence[Arm]) -> Drawn | None:
    """Each run as a point: how far the weights went, and what came of it."""
    has_tasks = any(run.accuracy() is not None for arm in arms for run in arm.runs)
    measure: Callable[[Run], float | None]
    if has_tasks:
        measure, label = (lambda run: run.accuracy()), "exact match over the generated tasks"
    else:
        measure, label = (lambda run: run.at("bound", "masked", "16")), "bound at block 16, nats per token"
    figure, drawn = _figure(3.7), False
    for number, module in enumerate(("attention", "FFN"), 1):
        axes = figure.add_subplot(1, 2, number)
        for arm in arms:
            points = [(run.drifted(module, "rel_fro"), measure(run)) for run in arm.runs]
            known = [(drifted, came) for drifted, came in points if drifted is not None and came is not None]
            if known:
                x, y = zip(*known, strict=True)
                axes.scatter(x, y, s=28, color=arm.color, label=arm.title)
                drawn = True
        axes.set(xlabel=f"drift of {module}, ‖ΔW‖/‖W₀‖", ylabel=label if number == 1 else "")
        _tidy(axes)
        if has_tasks:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend(figure, arms)
    return _drawn("Drift against what came of it", "A point is a run.", figure) if drawn else None


def frontier(arms: Sequence[Arm]) -> Drawn | None:
    """Exact match against tokens per forward and per second, a line over decoders of a kind."""
    figure, drawn = _figure(3.7), False
    rates: list[tuple[str, Rate]] = [
        ("tokens per forward", lambda run, decoder: run.per_forward(None, decoder)),
        ("tokens per second", _per_second),
    ]
    kinds = [("threshold", "o-"), ("per forward", "s:"), (ONE_BY_ONE, "o")]
    for number, (label, rate) in enumerate(rates, 1):
        axes = figure.add_subplot(1, 2, number)
        for arm in arms:
            for kind, style in kinds:
                points = _frontier(arm, kind, rate)
                if points:
                    x, y = zip(*points, strict=True)
                    name = "_" if kind == "per forward" else arm.title  # once in the legend
                    axes.plot(x, y, style, color=arm.color, label=name, markersize=4)
                    drawn = True
        axes.set(xlabel=label, ylabel="exact match" if number == 1 else "")
        _tidy(axes)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend(figure, arms)
    note = (
        "Means over the generated tasks and seeds. Lines with dots: every mask surer than 0.5, 0.7 or 0.9; "
        "dotted with squares: 1, 2, 4, 8 masks per forward. Seconds are of prompts in batches."
    )
    return _drawn("The frontier of accuracy and speed", note, figure) if drawn else None


def _frontier(arm: Arm, kind: str, rate: Rate) -> list[tuple[float, float]]:
    """(rate, exact match) of each decoder of a kind, means over seeds."""
    decoders = dict.fromkeys(row["decoder"] for run in arm.runs for row in run.found.get("tasks") or [])
    points = []
    for decoder in decoders:
        right = arm.values(lambda run, d=decoder: run.accuracy(None, d))  # type: ignore[misc]
        fast = arm.values(lambda run, d=decoder: rate(run, d))  # type: ignore[misc]
        if kind in decoder and right and fast:
            points.append((sum(fast) / len(fast), sum(right) / len(right)))
    return points


def _per_second(run: Run, decoder: str) -> float | None:
    rows = [row for row in run.rows(decoder) if row["seconds"]]
    return sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows) if rows else None


def profiles(arms: Sequence[Arm]) -> Drawn | None:
    """The bound by place in the block, and the cross-entropy by noise level."""

    def places(run: Run) -> list[tuple[float, float]]:
        found = run.found.get("profile", {}).get("position", {})
        return sorted((int(place), value) for place, value in found.items())

    def levels(run: Run) -> list[tuple[float, float]]:
        found = run.found.get("profile", {}).get("level", {})
        return [((n + 0.5) / len(NAMES), found[share]) for n, share in enumerate(NAMES) if share in found]

    figure = _panels(
        arms,
        [
            ("by place in a block of 16", "bound, nats per token", places),
            ("by share masked", "−log p, unweighted", levels),
        ],
        xlabel="",
    )
    note = "Of blocks of 16 behind a clean prefix, the same for all arms."
    return _drawn("Where the loss is", note, figure) if figure else None
