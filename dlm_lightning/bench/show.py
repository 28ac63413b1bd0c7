"""A measurement for the eye: a table per recipe, and a picture of ratios or of growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dlm_lightning.bench.arms import AR, OURS
from dlm_lightning.bench.record import Contest, Measured, Record
from dlm_lightning.bench.timing import Spread

PICTURE = "bench.png"
NONE = "–"
COLOURS = {OURS: "#1f4e79", AR: "#5a9e6f"}
OTHERS = ["#d9822b", "#8c6bb1", "#b04a4a", "#6b6b6b"]  # of baselines


# The table


def tables(record: Record) -> Group:
    """One table for each recipe and value."""
    return Group(Text(record.device), *(table(contest, record) for contest in record.contests))


def table(contest: Contest, record: Record) -> Table:
    """The arms of a contest, a row each."""
    columns = ["step, ms", "data/s", "scored/s", "forward/s", "× AR", "× ours", "peak", "MFU"]
    shown = Table(
        "",
        title=contest_title(contest, record),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for arm in contest.arms:
        shown.add_row(arm.name, *_cells(contest, arm, record.peak))
    return shown


def contest_title(contest: Contest, record: Record) -> str:
    """The recipe, its precision, and the value of what grows."""
    growth = record.settings.get("growth")
    value = f", {growth[0]}={contest.value}" if growth else ""
    return f"{contest.recipe}, {contest.precision}{value}"


def _cells(contest: Contest, arm: Measured, peak: float | None) -> list[str]:
    seconds = Spread.of(arm.seconds)
    rates = [thousands(count / seconds.median) for count in (arm.data, arm.scored, arm.forward)]
    over_ar = NONE if arm.name == AR else spread(contest.ratio(arm.name, AR))
    over_ours = spread(contest.ratio(arm.name, OURS)) if arm.name in contest.baselines else NONE
    mfu = f"{arm.flops / seconds.median / peak:.1%}" if arm.flops and peak else NONE
    time = spread(Spread(*(1000 * s for s in seconds)), 1 if seconds.median < 0.1 else 0)
    return [time, *rates, over_ar, over_ours, _bytes(arm.memory), mfu]


def spread(values: Spread, digits: int = 2) -> str:
    """Median and half of the distance between the quartiles."""
    return f"{values.median:,.{digits}f} ± {(values.high - values.low) / 2:,.{digits}f}"


def thousands(number: float) -> str:
    """A rate in three digits, with k from ten thousand on."""
    return (
        f"{number / 1000:,.3g}k"
        if 1e4 <= number < 1e6
        else f"{number:,.0f}"
        if number < 1e4
        else f"{number / 1e6:.3g}M"
    )


def _bytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


# The picture


def draw(record: Record, path: Path) -> None:
    """Ratios with their quartiles; or, where something grows, seconds against its values."""
    from matplotlib.figure import Figure

    growth = record.settings.get("growth")
    recipes = list(dict.fromkeys(contest.recipe for contest in record.contests))
    of = [[contest for contest in record.contests if contest.recipe == recipe] for recipe in recipes]
    rows = max(len(contests[0].ratios()) for contests in of)
    height = 4.2 if growth else 1.2 + 0.42 * rows
    figure = Figure(figsize=(1.0 + 4.8 * len(recipes), height), layout="constrained")
    places = figure.subplots(1, len(recipes), squeeze=False, sharey=bool(growth))[0]
    for axes, contests in zip(places, of, strict=True):
        if growth:
            _growth(axes, contests, growth[0])
        else:
            _ratios(axes, contests[0])
        axes.set_title(f"{contests[0].recipe}, {contests[0].precision}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _ratios(axes, contest: Contest) -> None:
    for place, (name, values) in enumerate(reversed(contest.ratios().items())):
        colour = _colours(contest)[name.split("/")[0]]
        errors = [[values.median - values.low], [values.high - values.median]]
        axes.barh(place, values.median, xerr=errors, color=colour, height=0.6, ecolor="#222222", capsize=3)
        axes.annotate(
            f"{values.median:.2f}", (values.high, place), (6, 0), textcoords="offset points", va="center", fontsize=9
        )
    names = [" / ".join(name.split("/")) for name in reversed(contest.ratios())]
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("ratio of step times: median and quartiles of the turns")


def _growth(axes, contests: Sequence[Contest], key: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    x = [float(contest.value) for contest in contests if contest.value is not None]
    for name, colour in _colours(contests[0]).items():
        seconds = [Spread.of(contest.arm(name).seconds) for contest in contests]
        errors = [[s.median - s.low for s in seconds], [s.high - s.median for s in seconds]]
        axes.errorbar(x, [s.median for s in seconds], errors, color=colour, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # some of them within less than a decade, too
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_xlabel(key)
    axes.set_ylabel("seconds of a step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _colours(contest: Contest) -> dict[str, str]:
    others = dict(zip(contest.baselines, OTHERS, strict=False))
    return {arm.name: (COLOURS | others).get(arm.name, OTHERS[-1]) for arm in contest.arms}
