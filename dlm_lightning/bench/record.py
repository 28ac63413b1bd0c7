"""What was measured, as it is kept in `bench.json`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers

from dlm_lightning import __version__
from dlm_lightning.bench.arms import AR, OURS
from dlm_lightning.bench.timing import Spread, ratio

JSON = "bench.json"


@dataclass(frozen=True)
class Measured:
    """An arm's step.

    seconds: of each turn. data, scored, forward: tokens of the corpus, terms of the loss, through the network.
    memory: bytes at the fullest moment. flops: that the pattern needs, None where no peak is known. loss: per token.
    """

    name: str
    seconds: list[float]
    data: int
    scored: int
    forward: int
    memory: int
    flops: float | None
    loss: float


@dataclass(frozen=True)
class Contest:
    """The arms of one recipe, timed in turns. value: of the key that grows, if one does."""

    recipe: str
    value: str | None
    precision: str
    arms: list[Measured]

    def arm(self, name: str) -> Measured:
        """An arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def baselines(self) -> list[str]:
        """The names of the arms that stand for other ways to make the same step."""
        return [arm.name for arm in self.arms if arm.name not in (OURS, AR)]

    def ratio(self, above: str, below: str) -> Spread:
        """How many times as long one arm's step takes as another's."""
        return ratio(self.arm(above).seconds, self.arm(below).seconds)

    def ratios(self) -> dict[str, Spread]:
        """Every arm's time over that of the AR step, and every baseline's over ours, as `above/below`."""
        pairs = [(arm.name, AR) for arm in self.arms if arm.name != AR] + [(name, OURS) for name in self.baselines]
        return {f"{above}/{below}": self.ratio(above, below) for above, below in pairs}


@dataclass(frozen=True)
class Record:
    """A whole measurement. settings: what was asked for. peak: FLOP/s of the device, None where nobody says."""

    settings: dict[str, Any]
    device: str
    peak: float | None
    contests: Sequence[Contest]

    def plain(self) -> dict[str, Any]:
        """What JSON takes: everything, with ratios and what figures depend on beside the device."""
        contests = [
            asdict(contest) | {"ratios": {name: spread._asdict() for name, spread in contest.ratios().items()}}
            for contest in self.contests
        ]
        found = {"settings": self.settings, "device": self.device, "peak": self.peak, **surroundings()}
        return found | {"contests": contests}

    def save(self, folder: Path) -> None:
        """Write `bench.json`, in place of the one before."""
        beside = folder / f".{JSON}"
        beside.write_text(json.dumps(self.plain(), indent=1, ensure_ascii=False) + "\n")
        os.replace(beside, folder / JSON)


def surroundings() -> dict[str, Any]:
    """What figures depend on beside the device."""
    versions = {module.__name__: module.__version__ for module in (torch, lightning, transformers)}
    return {"threads": torch.get_num_threads(), "versions": {"dlm_lightning": __version__, **versions}}


def named(device: torch.device) -> str:
    """A device's name, as its maker has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]} ({os.cpu_count()} cores)"
