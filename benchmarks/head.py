"""The head alone: −log p of scored tokens, their weighted sum and its gradients, computed by whom?

    python benchmarks/head.py            # on the GPU, if there is one: a minute

Times it as training has it beside plain cross-entropy on all logits, torch's `linear_cross_entropy` in chunks (torch
2.13) and Liger's fused kernel (CUDA and the extra `liger`), which must give the same loss and gradients. Writes its
device's part of docs/results/head.json, and the table in head.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dlm_lightning import liger, readout
from dlm_lightning.bench.record import named, surroundings
from dlm_lightning.bench.show import spread
from dlm_lightning.bench.timing import Spread, ratio, take_turns, wait_for

OUT = Path(__file__).parents[1] / "docs" / "results"
SHAPES = {  # tokens, hidden size and vocabularies
    "cpu": (1024, 192, (4_096, 32_768)),
    "cuda": (8192, 1024, (151_936,)),
}
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}
NAMES = {
    "ours": "ours",
    "plain": "plain cross-entropy",
    "chunked": "torch's `linear_cross_entropy`",
    "liger": "`model.head=liger`",
}


class Head:
    """One head and its tokens, the last row banned; an arm is a way to compute the sum Σ w·(−log p)."""

    def __init__(self, device: torch.device, tokens: int, size: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        values = {"vocab_size": vocabulary, "hidden_size": size, "num_hidden_layers": 0}
        config = AutoConfig.for_model("qwen3", **values)
        self.network = AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(device)
        self.weight_VD: nn.Parameter = self.network.get_output_embeddings().weight
        self.hidden_ND = torch.randn(tokens, size, device=device, requires_grad=True)
        self.target_N = torch.randint(vocabulary - 1, (tokens,), device=device)
        self.weight_N = 1 / torch.rand(tokens, device=device).clamp(min=0.05)
        self.banned_X = torch.tensor([vocabulary - 1], device=device)
        self.allowed_V = torch.zeros(vocabulary, device=device).index_fill_(0, self.banned_X, -torch.inf)

    def arms(self, device: torch.device) -> dict[str, Callable[[], Tensor]]:
        """Those that are there."""
        found: dict[str, Callable[[], Tensor]] = {"ours": partial(self.ours, "torch"), "plain": self.plain}
        if hasattr(nn, "LinearCrossEntropyOptions"):
            found["chunked"] = self.chunked
        if liger.there(device):
            found["liger"] = partial(self.ours, "liger")
        return found

    def ours(self, head: readout.Head) -> Tensor:
        tokens = self.hidden_ND, self.target_N, self.weight_N
        return readout.weighted_nll(self.network, *tokens, self.banned_X, head)[0]

    def plain(self) -> Tensor:
        logits_NV = self.network.get_output_embeddings()(self.hidden_ND).float() + self.allowed_V
        return (F.cross_entropy(logits_NV, self.target_N, reduction="none") * self.weight_N).sum()

    def chunked(self) -> Tensor:
        """Autocast does not reach into it; a weight of each token is for unreduced losses only."""
        kind = self.hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        hidden_ND, weight_VD, bias_V = (x.to(dtype) for x in (self.hidden_ND, self.weight_VD, self.allowed_V))
        how = nn.LinearCrossEntropyOptions()
        nll_N = F.linear_cross_entropy(
            hidden_ND, weight_VD, self.target_N, linear_bias=bias_V, reduction="none", options=how
        )
        return (nll_N.float() * self.weight_N).sum()

    def step(self, arm: Callable[[], Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        """The sum, and its gradients by hidden states and head."""
        with torch.autocast(self.hidden_ND.device.type, dtype) if dtype else nullcontext():
            total = arm()
        return [total, *torch.autograd.grad(total, [self.hidden_ND, self.weight_VD])]


def measure(head: Head, device: torch.device, dtype: torch.dtype | None, turns: int) -> dict[str, list[float]]:
    """Seconds of each arm in each turn; ValueError if one does not compute what plain cross-entropy does."""
    arms = head.arms(device)
    expected = head.step(arms["plain"], dtype)
    for name, arm in arms.items():
        for mine, theirs in zip(head.step(arm, dtype), expected, strict=True):
            if not (mine - theirs).norm() <= (2e-2 if dtype else 1e-4) * theirs.norm():
                raise ValueError(f"{name} does not compute what plain cross-entropy does")
    return take_turns(
        {name: partial(head.step, arm, dtype) for name, arm in arms.items()}, turns, wait=wait_for(device)
    )


def table(records: dict[str, Any]) -> str:
    """The Markdown table: our milliseconds, and others' time over ours."""
    others = [name for name in NAMES if name != "ours"]
    lines = [
        f"| device | vocabulary | precision | ours, ms | {' | '.join(f'{NAMES[name]} over ours' for name in others)} |",
        "|---" * (4 + len(others)) + "|",
    ]
    for kind, (_, _, vocabularies) in SHAPES.items():
        record = records.get(kind)
        for vocabulary, precision in ((v, p) for v in vocabularies for p in PRECISIONS):
            cells = ["not measured"] * (1 + len(others))
            if record:
                seconds = record["seconds"][f"{vocabulary}/{precision}"]
                cells = [spread(Spread.of([1000 * s for s in seconds["ours"]]))]
                cells += [spread(ratio(seconds[n], seconds["ours"])) if n in seconds else "" for n in others]
            lines.append(f"| {kind} | {vocabulary:,} | {precision} | {' | '.join(cells)} |")
    said = {f"{r['device']}, threads: {r['threads']}, torch {r['versions']['torch']}" for r in records.values()}
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(said))}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, help="other than what the table is of, for a trial")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder with head.md")
    args = parser.parse_args()
    if args.turns < 2 or (args.tokens is not None and args.tokens < 1):
        parser.error("--turns must be at least 2, --tokens at least 1")
    if args.tokens and args.out == OUT:
        parser.error("a trial of other --tokens needs an --out of its own")
    if not (args.out / "head.md").is_file():
        parser.error(f"--out {args.out} has no head.md to write to")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, size, vocabularies = SHAPES[device.type]
    record = {"device": named(device), **surroundings(), "tokens": args.tokens or tokens, "hidden": size, "seconds": {}}
    for vocabulary in vocabularies:
        head = Head(device, record["tokens"], size, vocabulary)
        for precision, dtype in PRECISIONS.items():
            record["seconds"][f"{vocabulary}/{precision}"] = measure(head, device, dtype, args.turns)
    path, page = args.out / "head.json", args.out / "head.md"
    records = {**(json.loads(path.read_text()) if path.is_file() else {}), device.type: record}
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    before, rest = page.read_text().split("<!-- head -->\n")
    page.write_text(f"{before}<!-- head -->\n{table(records)}\n{rest[rest.index('<!-- end of head -->') :]}")
    print(page.read_text())


if __name__ == "__main__":
    main()
