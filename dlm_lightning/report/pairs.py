"""Same-seed differences of two arms: what can be told apart with so many seeds, and what cannot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlm_lightning.report.content import Arm, Run

# two-sided 95 % points of Student's t by degrees of freedom; beyond them the normal distribution's
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Paired:
    """Differences of runs that share a seed, b − a."""

    differences: Sequence[float]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.differences)

    @property
    def half_width(self) -> float:
        """Half of the mean's 95 % interval by Student's t; infinite for a single pair."""
        count = len(self.differences)
        if count < 2:
            return math.inf
        point = T[count - 2] if count - 2 < len(T) else 1.96
        return point * statistics.stdev(self.differences) / math.sqrt(count)

    @property
    def resolved(self) -> bool:
        """Whether all pairs agree in sign and the interval excludes 0."""
        agree = all(value > 0 for value in self.differences) or all(value < 0 for value in self.differences)
        return agree and abs(self.mean) > self.half_width


def paired(a: Arm, b: Arm, measure: Callable[[Run], float | None]) -> Paired | None:
    """b − a over the seeds that both have; None if there is none."""
    of_a = {run.seed: measure(run) for run in a.runs}
    found = [(of_a.get(run.seed), measure(run)) for run in b.runs]
    differences = [of_b - other for other, of_b in found if other is not None and of_b is not None]
    return Paired(differences) if differences else None
