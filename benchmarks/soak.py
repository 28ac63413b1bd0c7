"""Does a long run grow? Resident memory and open descriptors of 10,000 tiny steps with all that a run does beside them.

    python benchmarks/soak.py                            # minutes on two cores; writes the table below a heading
    python benchmarks/soak.py --steps 500 --out -        # only prints

`block_causal` on a source of random weights that is made on the spot, validated, sampled, measured for drift and
checkpointed every 50 steps. The slope is that of a straight line through the second half of what was sampled every 100
steps; its standard error takes the samples as independent, which neighbours are not quite.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import lightning as L
import numpy as np

from dlm_lightning import training

OUT = Path(__file__).parents[1] / "docs" / "results" / "reliability.md"
HEADING = "## Soak"
EVERY = 50  # steps between validations, drifts, samples and checkpoints
CONFIG = (
    "{model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 256, tie_word_embeddings: true}"
)
SMALL = ["data.row_length=64", "data.batch_size=4", "data.val_rows=8", "trainer.enable_progress_bar=false"]
CALLBACKS = [
    *("dlm_lightning.callbacks.checkpoints.Checkpoints", "dlm_lightning.callbacks.weight_drift.WeightDrift"),
    *("dlm_lightning.callbacks.samples.Samples", "dlm_lightning.callbacks.throughput.Throughput"),
]


class Resources(L.Callback):
    """Notes step, resident memory in KiB and open descriptors of this process every so many optimizer steps."""

    rows: list[tuple[int, float, int]] = []  # noqa: RUF012  # the parser makes the callback, so this is where it is read

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE") / 1024
            self.rows.append((trainer.global_step, resident, len(os.listdir("/proc/self/fd"))))


def soak(steps: int, every: int) -> None:
    """Train a source for a few steps, then convert it for `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number in range(20):
            (corpus / f"{number}.txt").write_text("".join(f"line {n} of file {number}\n" for n in range(200)))
        own = [*SMALL, f"data.paths=[{corpus}]", "data.val_share=0.1", f"data.cache_dir={folder}/cache"]
        source = [
            f"model.config={CONFIG}",
            "data.vocab_size=300",
            "trainer.max_steps=4",
            "trainer.val_check_interval=4",
        ]
        training.fit("ar_source", [*own, *source], f"{folder}/source", None)
        acting = [f"{{class_path: {path}, init_args: {{every_n_steps: {EVERY}}}}}" for path in CALLBACKS[:2]]
        plain = [f"{{class_path: {path}}}" for path in CALLBACKS[2:]]
        noting = f"{{class_path: {Resources.__module__}.Resources, init_args: {{every_n_steps: {every}}}}}"
        words = [
            *(f"model.source={folder}/source", f"trainer.callbacks=[{', '.join([*acting, *plain, noting])}]"),
            *(f"trainer.max_steps={steps}", f"trainer.val_check_interval={EVERY}"),
        ]
        training.fit("block_causal", [*own, *words], f"{folder}/run", None)


def slope(rows: list[tuple[int, float, int]]) -> tuple[float, float]:
    """KiB per 1,000 steps over the second half, and its standard error; two points and less have none."""
    half = np.array(rows[len(rows) // 2 :])
    if len(half) < 3:
        return float("nan"), float("nan")
    (rate, _), covariance = np.polyfit(half[:, 0] / 1000, half[:, 1], 1, cov="unscaled")
    residuals = half[:, 1] - np.polyval(np.polyfit(half[:, 0], half[:, 1], 1), half[:, 0])
    return float(rate), float(np.sqrt(covariance[0, 0] * (residuals**2).sum() / (len(half) - 2)))


def table(steps: int, rows: list[tuple[int, float, int]]) -> str:
    """What was found, in a few lines of Markdown."""
    rate, error = slope(rows)
    first, last = rows[0], rows[-1]
    return "\n".join(
        [
            f"    python benchmarks/soak.py --steps {steps}",
            "",
            f"`block_causal`, one process, {steps:,} steps; every {EVERY} validation, samples, drift and a checkpoint.",
            "",
            "| | first | last |",
            "|---|---|---|",
            f"| step | {first[0]:,} | {last[0]:,} |",
            f"| resident memory, KiB | {first[1]:,.0f} | {last[1]:,.0f} |",
            f"| open descriptors | {first[2]} | {last[2]} |",
            "",
            f"Slope over the second half: {rate:,.0f} ± {error:,.0f} KiB per 1,000 steps (standard error; "
            f"{len(rows) - len(rows) // 2} samples).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=100, help="steps between samples of memory and descriptors")
    parser.add_argument("--out", default=str(OUT), help="a Markdown file whose section is replaced; - for none")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    soak(args.steps, args.every)
    found = table(args.steps, Resources.rows)
    print(found)
    if args.out != "-":
        path = Path(args.out)
        text = path.read_text() if path.is_file() else "# Reliability, measured\n"
        before, _, after = text.partition(f"\n{HEADING}\n")
        others = after[after.find("\n## ") :] if "\n## " in after else ""
        path.write_text(f"{before}\n{HEADING}\n\n{found}\n{others}")


if __name__ == "__main__":
    main()
