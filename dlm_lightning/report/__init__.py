"""`dlm report`: runs side by side, as one HTML file that needs nothing else and as Markdown tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dlm_lightning import __version__
from dlm_lightning.report import figures, tables
from dlm_lightning.report.content import PLAN, arms_of, expand, read_json, read_run
from dlm_lightning.runs import METRICS

HTML, MARKDOWN = "report.html", "report.md"


def report(folders: Sequence[str], out: str | None = None) -> Path:
    """Write the report of runs, or of comparisons' runs; returns the HTML file's path.

    `out` is a folder; default is that of a single comparison, or else the working directory. Raises FileNotFoundError
    for a folder that holds neither a run nor runs.
    """
    runs = expand(folders)
    place = Path(out).expanduser() if out else Path(folders[0]).expanduser() if _is_comparison(folders) else Path()
    if not place.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {place}")
    return write(runs, place)


def _is_comparison(folders: Sequence[str]) -> bool:
    return len(folders) == 1 and not (Path(folders[0]).expanduser() / METRICS).is_file()


def write(runs: Sequence[Path], place: Path) -> Path:
    """Write `report.html` and `report.md` of these runs into a folder; returns the first one's path."""
    plan = read_json(place / PLAN) if (place / PLAN).is_file() else None
    arms = arms_of([read_run(run) for run in runs])
    found = tables.all_of(arms)
    drawn = figures.all_of(arms)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html").render(
        arms=arms,
        budget=budget(plan) if plan else "",
        tables=found,
        figures=drawn,
        samples=tables.samples(arms),
        version=__version__,
    )
    _write(place / HTML, page)
    _write(place / MARKDOWN, "\n\n".join(table.markdown() for table in found) + "\n")
    return place / HTML


def budget(plan: dict[str, Any]) -> str:
    """What a comparison gave to every arm, in a sentence."""
    unit, amount = plan["budget"]["unit"], plan["budget"]["amount"]
    of_steps = ", ".join(f"{arm} {steps:,}" for arm, steps in plan["steps"].items())
    if unit == "steps":
        return f"Every arm made {next(iter(plan['steps'].values())):,} optimizer steps on the same data tokens."
    what = "forward tokens" if unit == "forward_tokens" else "seconds of training"
    return f"Every arm got {amount:,.0f} {what}. Optimizer steps: {of_steps}."


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
