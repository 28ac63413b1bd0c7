"""The tables of a report, for HTML and for Markdown."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from dlm_lightning.report.content import Arm, Run
from dlm_lightning.report.pairs import paired
from dlm_lightning.tasks import PYTHON

METRICS = ("mean_abs", "rel_fro", "cosine", "w1", "stable_rank")
SIZES = ("1", "4", "16", "32")
Measure = Callable[[Run], float | None]


@dataclass
class Table:
    """A title, a head, rows of texts, and what must be known to read it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    text: bool = False  # cells are texts to be read, not numbers to be compared

    def markdown(self) -> str:
        """With its title as a heading."""
        head = [f"| {' | '.join(map(_cell, self.head))} |", "|" + "---|" * len(self.head)]
        rows = [f"| {' | '.join(map(_cell, row))} |" for row in self.rows]
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), *head, *rows])

    @property
    def numbers(self) -> list[bool]:
        """Whether a column holds numbers, which are read from the right."""
        columns = zip(*self.rows, strict=True)
        return [not self.text and all(cell[:1] in "0123456789−+(–" for cell in column) for column in columns]

    def pruned(self) -> Table:
        """Without the columns that hold nothing."""
        kept = [n for n, column in enumerate(zip(*self.rows, strict=True)) if set(column) != {"–"}]
        rows = [[row[n] for n in kept] for row in self.rows]
        return replace(self, head=[self.head[n] for n in kept], rows=rows)


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("<", "&lt;")


def spread(values: Sequence[float], digits: int = 3, percent: bool = False) -> str:
    """Mean ± standard deviation over seeds; the value alone if it is one, or the same for all."""
    if not values:
        return "–"
    scale, unit = (100, "%") if percent else (1, "")
    mean = signed(f"{scale * statistics.fmean(values):,.{digits}f}")
    if len(set(values)) == 1:
        return mean + unit
    return f"{mean} ± {scale * statistics.stdev(values):,.{digits}f}{unit}"


def signed(number: str) -> str:
    """A number's text with a minus sign for a hyphen."""
    return number.replace("-", "−")


def all_of(arms: Sequence[Arm]) -> list[Table]:
    """Every table that has something in it."""
    made = [
        summary(arms),
        exceptions(arms),
        pairs(arms),
        bounds(arms),
        retention(arms),
        drift(arms),
        tasks(arms),
        work(arms),
        differing(arms),
    ]
    return [*(table.pruned() for table in made if table.rows), commands(arms)]


def summary(arms: Sequence[Arm]) -> Table:
    """The first thing to look at."""
    rows = []
    for arm in arms:
        measures: list[tuple[Measure, int, bool]] = [
            (lambda run: run.at("bound", "masked", "16"), 3, False),
            (lambda run: run.at("bound", "masked", "1"), 3, False),
            (lambda run: run.accuracy(), 1, True),
            (lambda run: run.per_forward(), 2, False),
            (lambda run: run.drifted("attention", "rel_fro"), 3, False),
            (lambda run: run.drifted("FFN", "rel_fro"), 3, False),
        ]
        cells = [spread(arm.values(measure), digits, percent) for measure, digits, percent in measures]
        rows.append([arm.title, arm.label, str(len(arm.runs)), *cells])
    head = ["arm", "pattern", "seeds", "bound, block 16", "bound, block 1", "exact match", "TPF"]
    head += ["drift of attention", "drift of FFN"]
    note = (
        "Bounds in nats per token, lower is better: one noisy block behind a clean prefix, the rest of the model's own "
        "block or document masked. Exact match: mean over the generated tasks, threshold 0.9. Drift: ‖ΔW‖/‖W₀‖. "
        "Mean ± standard deviation over seeds."
    )
    return Table("Summary", head, rows, note)


def exceptions(arms: Sequence[Arm]) -> Table:
    """Runs that are not like the others of their arm."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            said = [f"unfinished: {run.unfinished}"] if run.unfinished else []
            if not run.found:
                said.append("not measured: `dlm eval` has not seen its newest checkpoint")
            elif overrides := run.found["asked"]["overrides"]:
                said.append(f"measured with {' '.join(overrides)}")
            if said:
                rows.append([arm.title, str(run.seed), "; ".join(said)])
    return Table("Look out", ["arm", "seed", "which is"], rows, "These runs are not like the others.", text=True)


def bounds(arms: Sequence[Arm]) -> Table:
    """The common yardstick, and each pattern's own bound."""
    rows = []
    for arm in arms:
        own = arm.values(lambda run: run.at("val", "nelbo"))
        for future in ("masked", "absent"):
            cells = [spread(arm.values(lambda run, s=size, f=future: run.at("bound", f, s))) for size in SIZES]  # type: ignore[misc]
            if any(cell != "–" for cell in cells):
                rows.append([arm.title, future, *cells, f"{spread(own)}", str(arm.pattern.get("block_size") or "–")])
    head = ["arm", "future", *(f"block {size}" for size in SIZES), "own NELBO", "own block"]
    note = (
        "Nats per token. The same noise for all. The own NELBO is a bound under the pattern's own blocks and noise: it "
        "does not rank patterns. Future: what follows the block in the model's own block or document is masked, or not "
        "there."
    )
    return Table("The common yardstick: block-wise bound by block size", head, rows, note)


def retention(arms: Sequence[Arm]) -> Table:
    """How much of the source is left: in its own readout, in the model's, and in its hidden states."""
    rows: list[list[str]] = []
    for arm in arms:
        layers = sorted({int(key) for run in arm.runs for key in (run.at("representation", "clean", "cka") or {})})
        if not layers:
            continue
        last = str(layers[-1])
        measures: list[Measure] = [
            lambda run: run.at("val", "ar_nll"),
            lambda run: run.at("bound", "masked", "1"),
            lambda run, n=last: run.at("representation", "clean", "cka", n),  # type: ignore[misc]
            lambda run, n=last: run.at("representation", "masked", "cka", n),  # type: ignore[misc]
            lambda run, n=last: run.at("representation", "clean", "rankme", n),  # type: ignore[misc]
            lambda run, n=last: run.at("representation", "masked", "rankme", n),  # type: ignore[misc]
            lambda run, n=last: run.at("representation", "clean", "alpha_req", n),  # type: ignore[misc]
        ]
        if not rows:
            rows.append(_source_row(arms, last))
        shift = "shift" if arm.pattern.get("shift") == "next_token" else "no shift"
        rows.append([arm.title, shift, *(spread(arm.values(measure)) for measure in measures)])
    head = ["arm", "readout", "next-token NLL, source's readout", "block-1 NLL, own readout"]
    head += ["CKA, clear text", "CKA, masked", "RankMe, clear text", "RankMe, masked", "α-ReQ, clear text"]
    note = (
        "Next-token NLL by the source's readout compares only arms of one shift setting. CKA to the source, RankMe and "
        "α-ReQ are of the last layer."
    )
    return Table("What is left of the AR source", head, rows, note)


def _source_row(arms: Sequence[Arm], last: str) -> list[str]:
    """The source itself, as the arms found it before their first step and beside them."""

    def of_all(measure: Measure) -> str:
        return spread([value for arm in arms for value in arm.values(measure)])

    before = of_all(lambda run: run.first("val/ar_nll"))
    rank, alpha = (
        of_all(lambda run, n=name: run.at("representation", "clean", n, last))  # type: ignore[misc]
        for name in ("source_rankme", "source_alpha_req")
    )
    return ["the source", "shift", before, before, "1.000", "–", rank, "–", alpha]


def drift(arms: Sequence[Arm]) -> Table:
    """Weight drift, all metrics; and what the gradient's variance is made of."""
    rows = []
    for arm in arms:
        noise = spread(arm.values(lambda run: _ratio(run.at("gradient", "noise"), run.at("gradient", "data"))), 2)
        for module in ("attention", "FFN"):
            values = {
                metric: arm.values(lambda run, m=module, name=metric: run.drifted(m, name))  # type: ignore[misc]
                for metric in METRICS
            }
            if values["rel_fro"]:
                cells = [spread(values[metric], 1 if metric == "stable_rank" else 4) for metric in METRICS]
                rows.append([arm.title, module, *cells, noise if module == "attention" else "–"])
    head = ["arm", "module", "mean abs ΔW", "‖ΔW‖/‖W₀‖", "cosine", "W₁", "stable rank", "gradient, masks / data"]
    note = "The last column is the gradient's variance over masks, in units of its variance over rows of data."
    return Table("Weight drift and gradient", head, rows, note)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None and b > 0 else None


def tasks(arms: Sequence[Arm]) -> Table:
    """Every task with every decoder."""
    named = dict.fromkeys(row["task"] for arm in arms for run in arm.runs for row in run.found.get("tasks") or [])
    columns: list[tuple[str, str, str]] = []  # head, task, what is counted
    for task in named:
        columns.append((task, task, "exact"))
        columns += [("its identifiers", task, "identifiers"), ("it parses", task, "parses")] if task == PYTHON else []
    rows = []
    for arm in arms:
        for decoder in dict.fromkeys(row["decoder"] for run in arm.runs for row in run.found.get("tasks") or []):
            cells = [
                spread(arm.values(lambda run, t=task, d=decoder, n=name: run.accuracy(t, d, n)), 0, True)  # type: ignore[misc]
                for _, task, name in columns
            ]
            per_forward = spread(arm.values(lambda run, d=decoder: run.per_forward(None, d)), 2)  # type: ignore[misc]
            rows.append([arm.title, decoder, *cells, per_forward])
    note = (
        "Exact match of held-out questions; a task's name is followed by its answers' lengths in characters. TPF: "
        "tokens per forward over all tasks. Thresholds fill every mask surer than that, others so many per forward."
    )
    return Table("Tasks", ["arm", "decoder", *(head for head, *_ in columns), "TPF"], rows, note)


def work(arms: Sequence[Arm]) -> Table:
    """What each arm has done, by every count."""
    rows = []
    for arm in arms:
        counts: list[tuple[Measure, int]] = [
            (lambda run: run.steps, 0),
            (lambda run: _millions(run.tokens("data")), 3),
            (lambda run: _millions(run.tokens("scored")), 3),
            (lambda run: _millions(run.tokens("forward")), 3),
            (lambda run: run.training_seconds, 1),
            (lambda run: run.last("speed/data_tokens_per_second"), 0),
            (lambda run: run.last("speed/forward_tokens_per_second"), 0),
            (lambda run: run.last("speed/peak_memory_gib"), 2),
        ]
        rows.append([arm.title, *(spread(arm.values(measure), digits) for measure, digits in counts)])
    head = ["arm", "steps", "data tokens, M", "scored tokens, M", "forward tokens, M", "seconds of training"]
    head += ["data tokens/s", "forward tokens/s", "peak memory, GiB"]
    note = (
        "Data tokens are the corpus's, scored ones are terms of the loss, forward ones passed the network. Rates are "
        "those at the end of the runs; runs that went side by side share a machine."
    )
    return Table("Work and speed", head, rows, note)


def _millions(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def pairs(arms: Sequence[Arm]) -> Table:
    """Same-seed differences of every two arms in what matters most."""
    measures: list[tuple[str, Measure, float, int]] = [
        ("bound, block 16", lambda run: run.at("bound", "masked", "16"), 1, 3),
        ("exact match, points", lambda run: run.accuracy(), 100, 1),
        ("drift of attention", lambda run: run.drifted("attention", "rel_fro"), 1, 4),
        ("drift of FFN", lambda run: run.drifted("FFN", "rel_fro"), 1, 4),
    ]
    rows = []
    for a, b in combinations(arms, 2):
        cells = []
        for _, measure, scale, digits in measures:
            found = paired(a, b, measure)
            if found is None or len(found.differences) < 2:
                cells.append("–")
                continue
            text = signed(f"{scale * found.mean:+.{digits}f}") + f" ± {scale * found.half_width:.{digits}f}"
            cells.append(text if found.resolved else f"({text})")
        if any(cell != "–" for cell in cells):
            rows.append([f"{b.title} − {a.title}", *cells])
    note = (
        "Mean over seeds of same-seed differences, ± half of its 95 % interval (Student's t). In parentheses: not "
        "resolvable here, because seeds disagree in sign or the interval holds 0."
    )
    return Table("Pairs", ["arms", *(name for name, *_ in measures)], rows, note)


def differing(arms: Sequence[Arm]) -> Table:
    """The config keys in which arms differ, and no others."""
    keys = list(dict.fromkeys(key for arm in arms for key in arm.differing))
    rows = [[key, *(str(arm.differing.get(key, arm.runs[0].config.get(key, "–"))) for arm in arms)] for key in keys]
    return Table("Config keys that differ", ["key", *(arm.title for arm in arms)], rows, text=True)


def commands(arms: Sequence[Arm]) -> Table:
    """What makes each run's folder and its measures again."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            rows.append([arm.title, str(run.seed), f"dlm fit {shlex.join(run.command)}"])
    note = "Each run, which `dlm eval RUN` then measured; `dlm report RUN…` made this page."
    return Table("Commands", ["arm", "seed", "command"], rows, note, text=True)


def samples(arms: Sequence[Arm]) -> list[dict[str, object]]:
    """Continuations of the same prompts by the first run of each arm."""
    prompts = dict.fromkeys(sample["prompt"] for arm in arms for sample in arm.runs[0].found.get("samples") or [])
    return [
        {
            "prompt": prompt,
            "texts": [
                (arm.title, re.sub(r"\n\s*\n\s*\n+", "\n\n", sample["text"]).strip() or "(nothing but white space)")
                for arm in arms
                for sample in arm.runs[0].found.get("samples") or []
                if sample["prompt"] == prompt
            ],
        }
        for prompt in prompts
    ]
