"""Is conversion real? The shipped recipes at their own budget, from the AR source and from random weights."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "conversion.py"
MARK = 1.5  # nats below the corpus's unigram entropy
CLEARLY = 0.3  # nats; docs/results/conversion.md has the ranges over seeds


def last_nelbo(run: Path) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["val/nelbo"]) for row in csv.DictReader(file) if row["val/nelbo"]][-1]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_each_pattern_ends_far_below_word_frequencies_and_below_random_weights(row_cache, tmp_path):
    def command(*words: object) -> str:
        environment = {**os.environ, "XDG_CACHE_HOME": str(row_cache), "OMP_NUM_THREADS": "1"}
        words = (sys.executable, *map(str, words))
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = command("-m", "dlm_lightning.cli", "fit", "ar_source")
    unigram = float(re.search(r"unigram entropy (\d+\.\d+)", said)[1])
    table = command(BENCHMARK, "--seeds", 1, "--jobs", 2, "--out", tmp_path / "table.md")
    for recipe in ("full_bidirectional", "block_causal", "complementary_mask"):
        arms = (tmp_path / "runs" / "conversion" / f"{recipe}-{start}-0" for start in ("source", "random"))
        source, random = map(last_nelbo, arms)
        assert source <= unigram - MARK, table
        assert source <= random - CLEARLY, table
