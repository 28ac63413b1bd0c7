"""What is asked of a comparison, and the folder that keeps it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dlm_lightning.report import HTML
from dlm_lightning.report.content import PLAN

FOLDER = Path("runs/compare")
UNITS = ("steps", "forward_tokens", "seconds")
FOUND = ("steps", "cwd")  # of a request, what need not be the same when it is repeated


@dataclass(frozen=True)
class Budget:
    """How much work an arm gets.

    unit: optimizer `steps`, which have equal data tokens; `forward_tokens`; or `seconds` of training.
    amount: of them; None takes the recipes' own `trainer.max_steps`.
    """

    unit: str = "steps"
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"a budget is counted in {' or '.join(UNITS)}, not {self.unit}")
        if self.amount is not None and not 0 < self.amount < math.inf:
            raise ValueError(f"--{self.unit.replace('_', '-')} must be above 0 and finite, not {self.amount:g}")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    recipes: by the names of their arms. overrides: for all arms that take them. seeds: runs of each arm.
    tasks, prompts: of `dlm eval`. cwd: where paths in recipes and overrides begin. steps: of each arm, once known.
    """

    recipes: dict[str, str]
    overrides: list[str]
    seeds: int
    budget: Budget
    control: bool
    tasks: list[str] | None
    prompts: int
    cwd: str = field(default_factory=os.getcwd)
    steps: dict[str, int] = field(default_factory=dict)

    def save(self, place: Path) -> None:
        """Keep it in its folder; all or nothing."""
        beside = place / f".{PLAN}.{os.getpid()}"
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(beside, place / PLAN)

    @classmethod
    def load(cls, place: Path) -> Comparison:
        """What a folder keeps; ValueError if it cannot be read."""
        try:
            values = json.loads((place / PLAN).read_text())
            return cls(**{**values, "budget": Budget(**values["budget"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place / PLAN} is damaged: {error}") from error

    def difference(self, other: Comparison) -> str | None:
        """A key in which two requests differ; more seeds of the same arms are no difference."""
        ignored = {*FOUND, "seeds"}
        return next((n for n in asdict(self) if n not in ignored and getattr(self, n) != getattr(other, n)), None)

    def within(self, folder: str | None) -> tuple[Path, Comparison]:
        """The folder for it, and it with what that already knows.

        That is a named folder, which must hold nothing else than the same comparison; or an unfinished one that asks
        for the same; or a new number below `runs/compare`.
        """
        if folder is None:
            numbered = sorted((p for p in FOLDER.glob("*") if p.name.isdigit()), key=lambda p: -int(p.name))
            for place in numbered:
                if (place / PLAN).is_file() and not (place / HTML).is_file():
                    kept = Comparison.load(place)
                    if not self.difference(kept) and kept.seeds == self.seeds and kept.cwd == self.cwd:
                        return place.resolve(), kept
            return (FOLDER / str(int(numbered[0].name) + 1 if numbered else 1)).resolve(), self
        place = Path(folder).expanduser()
        if not folder.strip() or place.is_file():
            raise ValueError(f"--run needs the name of a folder, not {folder!r}")
        if not (place / PLAN).is_file():
            if place.is_dir() and any(place.iterdir()):
                raise FileExistsError(f"--run {folder} already holds something else; name a new folder")
            return place.resolve(), self
        kept = Comparison.load(place)
        if not kept.steps:  # it never began
            return place.resolve(), self
        if key := self.difference(kept):
            was, now = (_brief(getattr(request, key)) for request in (kept, self))
            raise ValueError(f"--run {folder} holds a comparison with {key} {was}, not {now}; name a new folder")
        return place.resolve(), replace(kept, seeds=max(self.seeds, kept.seeds))


def _brief(value: Any) -> str:
    if isinstance(value, Budget):
        return f"{value.unit} {value.amount}"
    return ", ".join(value) or "none" if isinstance(value, list | dict) else str(value)
