"""What the papers found, as differences of arms of the study, and how what is measured here is judged.

A finding **reproduces** or **contradicts** if all same-seed pairs of both sources agree in sign and the 95 % interval
of their mean excludes 0; or else it is **not resolvable here**.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlm_lightning.report.pairs import Paired

SOURCES = ("qwen3", "llama")
SEEDS = 3
PAIRS = SEEDS * len(SOURCES)  # same-seed differences of a finding
SHOWN = (
    *(f"exact match, {k} per forward" for k in ("one token", "2", "4", "8")),
    "bound, block 16",
    "drift of attention",
    "drift of FFN",
)
ONE, TWO, FOUR, EIGHT, BOUND, ATTENTION, FFN = SHOWN


def way(kind: str, size: int, k: int) -> str:
    """A way of decoding, in words."""
    return f"{kind}s of {size} in decoding, {k} per forward"


@dataclass(frozen=True)
class Finding:
    """A paper's claim as a difference: of `arm` less `than`, in a measure, positive or negative as the paper says.

    `against` is the measure of `than`, if it is another one.
    """

    item: str
    claim: str
    arm: str
    than: str
    measure: str
    sign: int
    paper: str
    against: str = ""

    @property
    def name(self) -> str:
        """Its key in study.json."""
        return f"{self.item}: {self.claim}; {self.measure}"


PARTS_8, BLOCKS_8 = way("part", 8, 4), way("block", 8, 4)
AT_4, AT_16, AT_32 = (way("block", size, 1) for size in (4, 16, 32))
FINDINGS = [
    Finding("1", "block-wise is more accurate than bidirectional", "block", "bidirectional", ONE, 1, "+19.12 (g − c)"),
    Finding("1", "block-wise has the lower bound", "block", "bidirectional", BOUND, -1, "not given"),
    Finding(
        "1", "a noisy context is more accurate than bidirectional", "block_noisy", "bidirectional", ONE, 1, "+8.94"
    ),
    Finding("1", "a clean context is more accurate than a noisy one", "block", "block_noisy", ONE, 1, "+9.46 (f − d)"),
    Finding("1", "a clean context has the lower bound", "block", "block_noisy", BOUND, -1, "not given"),
    Finding("1", "bidirectional drifts more, attention", "bidirectional", "block", ATTENTION, 1, "figure 2e"),
    Finding("1", "bidirectional drifts more, FFN", "bidirectional", "block", FFN, 1, "figure 2e"),
    Finding("1", "a noisy context drifts more, FFN", "block_noisy", "block", FFN, 1, "figure 2e"),
    Finding("2", "no shift is better, block-wise", "block", "block_shift", ONE, 1, "+0.72 (g − f)"),
    Finding("2", "no shift is better, bidirectional", "bidirectional", "bidirectional_shift", ONE, 1, "+1.19 (c − b)"),
    *(
        Finding("4", f"half-life {x} is better than uniform", f"block_tilt_{arm}", "block", measure, 1, paper)
        for arm, x, papers in (
            ("10", "0.1", ("+1.75", "+1.67", "+2.64", "+4.38")),
            ("25", "0.25", ("+0.14", "+1.44", "−0.14", "+0.56")),
            ("05", "0.05", ("+0.24", "+0.56", "+1.95", "+3.39")),
        )
        for measure, paper in zip((ONE, TWO, FOUR, EIGHT), papers, strict=True)
    ),
    *(
        Finding("4", "right-to-left is worse than uniform", "block_right_to_left", "block", measure, -1, paper)
        for measure, paper in zip((ONE, TWO, FOUR, EIGHT), ("−22.06", "−29.57", "−32.51", "−19.86"), strict=True)
    ),
    Finding("3", "training blocks of 16 beat those of 4 where 16 are decoded", "block", "block_4", AT_16, 1, "+15.2"),
    Finding("3", "and where 4 are decoded", "block", "block_4", AT_4, 1, "+12.4"),
    Finding("3", "training blocks of 32 are worse than those of 16", "block_32", "block", AT_32, -1, "−2.3; 4B −0.8"),
    Finding("3", "larger training blocks drift more, attention", "block_32", "block", ATTENTION, 1, "figure 4"),
    Finding("3", "larger training blocks drift more, FFN", "block_32", "block", FFN, 1, "figure 4"),
    Finding(
        "5", "complementary views beat independent ones", "complementary", "independent_views", ONE, 1, "not given"
    ),
    Finding(
        "6", "parts of 8 beat blocks of 8 in decoding", *["complementary"] * 2, PARTS_8, 1, "+3.5, GSM8K", BLOCKS_8
    ),
    Finding("7", "a lower learning rate is worse", "lr_low", "block", ONE, -1, "−0.52 (3e-6), −6.07 (1e-6)"),
    Finding("7", "a higher learning rate is worse", "lr_high", "block", ONE, -1, "−4.04 (3e-5), −9.68 (1e-4)"),
    Finding("7", "a higher learning rate drifts more, attention", "lr_high", "block", ATTENTION, 1, "stated"),
    Finding("8", "LoRA of low rank is worse", "lora_4", "block", ONE, -1, "−10.48 (rank 16)"),
    Finding("8", "LoRA of high rank is worse", "lora_32", "block", ONE, -1, "−7.63 (rank 64)"),
    Finding("8", "a higher rank is better", "lora_32", "lora_4", ONE, 1, "+2.85"),
    Finding("9", "a first token from the clean copy is better", "complementary", "complementary_noisy", ONE, 1, "none"),
]


def judge(finding: Finding, by_source: dict[str, list[float]]) -> dict[str, Any]:
    """The verdict on a finding's pairs over all sources and seeds."""
    pairs = [difference for its in by_source.values() for difference in its]
    judged: dict[str, Any] = {"by_source": by_source, "pairs": len(pairs)}
    if not pairs:
        return {**judged, "verdict": "not measured"}
    paired = Paired(pairs)
    if len(pairs) < PAIRS:
        verdict = "too few pairs yet"
    elif not paired.resolved:
        verdict = "not resolvable here"
    else:
        verdict = "reproduces" if paired.mean * finding.sign > 0 else "contradicts"
    return {**judged, "mean": paired.mean, "half_width": paired.half_width, "verdict": verdict}


def verdict_table(findings: dict[str, Any]) -> str:
    """In Markdown."""
    head = ["item", "finding", "measure", "difference", "pairs", "the paper's", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for finding in FINDINGS:
        found, difference = findings[finding.name], "–"
        if found["pairs"]:
            digits = 4 if "drift" in finding.measure else 3 if finding.measure == BOUND else 1
            width = "" if found["pairs"] < 2 else f" ± {found['half_width']:.{digits}f}"
            difference = f"{found['mean']:+.{digits}f}{width}".replace("-", "−")
        cells = [finding.item, f"{finding.claim} (`{finding.arm}` − `{finding.than}`)", finding.measure, difference]
        cells += [str(found["pairs"]), finding.paper, f"**{found['verdict']}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
