"""Is nothing lost? Runs are killed by SIGKILL, resumed, killed again, and at last compared with undisturbed ones.

    python benchmarks/chaos.py --kills 100 --seed 0 --write   # `make chaos`: the table of docs/results/reliability.md
    python benchmarks/chaos.py --kills 3 --only block_causal/1  # a few, printed only

Three recipes, each on one rank, two under DDP and two under FSDP2, tiny and on generated text. Half of the kills wait
for a checkpoint that is being written, half come at a random moment of training; with two ranks, half of them hit one
rank only, and the other must end by itself. A resume that fails, a rank that hangs, or one bit that differs ends the
benchmark.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlm_lightning import checkpoint
from dlm_lightning.data.tokenizer import trained_tokenizer

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "reliability.md"
BEGIN, END = "<!-- chaos -->", "<!-- end of chaos -->"
RECIPES = ("full_bidirectional", "block_causal", "complementary_mask")
RANKS = {"1": [], "2 ddp": ["trainer.devices=2", "trainer.strategy=ddp"]}
RANKS["2 fsdp2"] = ["trainer.devices=2", "trainer.strategy=fsdp2"]
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards judge my vow of quartz"
STEPS = 90
PATIENCE = 300  # seconds until a rank that should have ended counts as hanging
PER_RUN = 12  # kills before a run is left to finish
BEGUN = "begun"
MARK = f"""
import lightning as L
from pathlib import Path
class Mark(L.Callback):
    def on_train_start(self, trainer, *_):
        if trainer.global_rank == 0: Path(trainer.default_root_dir, "{BEGUN}").touch()
"""


class Lost(Exception):
    """Something was lost, or hung."""


def prepare(folder: Path) -> list[str]:
    """A tiny source and a corpus in a folder; returns the overrides that train on them."""
    (folder / "mark.py").write_text(MARK)
    (folder / "texts").mkdir()
    words = WORDS.split()
    draw = random.Random(0)
    texts = ["\n".join(" ".join(draw.choices(words, k=9)) for _ in range(80)) for _ in range(8)]
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(text)
    tokenizer = trained_tokenizer(lambda: texts, 300, folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = Qwen3Config(
        vocab_size=300, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True, **sizes, **heads
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    own = "dlm_lightning.callbacks"
    callbacks = (
        f"[{{class_path: mark.Mark}}, "
        f"{{class_path: {own}.checkpoints.Checkpoints, init_args: {{every_n_steps: 3}}}}, "
        f"{{class_path: {own}.weight_drift.WeightDrift, init_args: {{every_n_steps: 30}}}}, "
        f"{{class_path: {own}.save_pretrained.SavePretrained}}]"
    )
    return [
        f"model.source={folder / 'source'}", f"data.paths=[{folder / 'texts'}]", "data.val_share=0.25",
        "data.row_length=32", "data.val_rows=8", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=20",
        "trainer.log_every_n_steps=1", f"trainer.callbacks={callbacks}",
    ]  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen:
    """A command in a session of its own, so that all of its processes can be found and killed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "dlm_lightning.cli", *words]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended, the ranks in their order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, ValueError):
            continue
        if int(own) == session and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait until a run has ended by itself, and well."""
    if process.wait():
        raise Lost(f"exit code {process.returncode}:\n{(folder / 'log').read_text()}")


def kill(process: subprocess.Popen, run: Path, ranks: int, longest: float, draw: random.Random) -> str | None:
    """Kill a run at a random moment; returns how, or None if it has ended before."""
    while not (run / BEGUN).exists():
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    writing, alone = draw.random() < 0.5, ranks > 1 and draw.random() < 0.5
    if writing:
        while not any((run / "checkpoints").glob(".step=*")) and process.poll() is None:
            pass
        time.sleep(draw.uniform(0, 0.02))
        writing = any((run / "checkpoints").glob(".step=*"))
    else:
        time.sleep(draw.uniform(0, longest))
    victims = alive(process.pid)
    if process.poll() is not None or not victims:
        return None
    for victim in [draw.choice(victims)] if alone else victims:
        os.kill(victim, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while alive(process.pid):
        if time.monotonic() > end:
            raise Lost(f"a rank hangs after another was killed; {process.args}")
        time.sleep(0.05)
    process.wait()
    return ("while writing" if writing else "while training") + (", one rank" if alone else "")


def difference(run: Path, whole: Path) -> str:
    """What differs between two finished runs, to the last bit and columns of time aside; nothing if they are equal."""
    states = [checkpoint.whole(path / checkpoint.FOLDER / f"step={STEPS}" / checkpoint.STATE) for path in (run, whole)]
    for key in ("state_dict", "optimizer_states"):
        ours, theirs = (list(tensors(state[key])) for state in states)
        if not ours or len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
            return key
    ours, theirs = metrics(run), metrics(whole)
    apart = [pair for pair in zip_longest(ours, theirs, fillvalue={}) if pair[0] != pair[1]]
    return f"metrics.csv: {apart[0][0]} instead of {apart[0][1]}" if apart else ""


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts and lists, by their keys' order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from tensors(item)


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without its columns of time."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if "seconds" not in k and not k.startswith("speed/")}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if set(row.values()) - {"", row["step"], row["epoch"]}]


def disturb(folder: Path, setting: list[str], recipe: str, way: str, kills: int, draw: random.Random) -> Counter[str]:
    """One run undisturbed, and others killed until there were so many kills; returns the kinds of kills."""
    ranks = int(way[0])
    words = ["fit", recipe, *setting, f"data.batch_size={4 // ranks}", *RANKS[way]]
    whole, run = folder / "whole", folder / "run"
    process = start(folder, *words, "--run", str(whole))
    while process.poll() is None and not (whole / BEGUN).exists():
        time.sleep(0.01)
    began = time.monotonic()
    finish(process, folder)
    longest, counted = (time.monotonic() - began) / 2, Counter[str]()
    while counted.total() < kills:
        shutil.rmtree(run, ignore_errors=True)
        command, most = [*words, "--run", str(run)], min(kills, counted.total() + PER_RUN)
        while counted.total() < most:
            (run / BEGUN).unlink(missing_ok=True)
            process = start(folder, *command)
            how = kill(process, run, ranks, longest, draw)
            command = ["resume", str(run)]
            if how is None:
                finish(process, folder)
                break
            counted[how] += 1
            if (run / checkpoint.FOLDER / f"step={STEPS}").is_dir():  # killed when all was saved
                break
        else:
            finish(start(folder, *command), folder)
        if what := difference(run, whole):
            raise Lost(f"{recipe} on {way} is not the undisturbed run after {dict(counted)}: {what}")
    for path in (whole, run):
        shutil.rmtree(path)
    return counted


def table(results: dict[tuple[str, str], Counter[str]]) -> str:
    """The Markdown table of all arms."""
    kinds = ["while training", "while writing", "while training, one rank", "while writing, one rank"]
    lines = [
        f"| recipe | ranks | kills | {' | '.join(kinds)} | equal to the bit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, way), counted in results.items():
        cells = [str(counted[kind]) if "one" not in kind or way[0] > "1" else "" for kind in kinds]
        lines.append(f"| `{recipe}` | {way} | {counted.total()} | {' | '.join(cells)} | yes |")
    total = sum((counted for counted in results.values()), Counter[str]())
    cells = [str(total[kind]) for kind in kinds]
    return "\n".join([*lines, f"| all | | {total.total()} | {' | '.join(cells)} | yes |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="shared out among the arms")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="one arm, such as block_causal/1 or 'block_causal/2 ddp'")
    parser.add_argument("--write", action="store_true", help="replace the table of docs/results/reliability.md")
    args = parser.parse_args()
    arms = [(recipe, way) for way in RANKS for recipe in RECIPES if args.only in (None, f"{recipe}/{way}")]
    results: dict[tuple[str, str], Counter[str]] = {}
    for number, (recipe, way) in enumerate(arms):
        kills = args.kills // len(arms) + (number < args.kills % len(arms))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw = random.Random(f"{args.seed} {recipe} {way}")
            results[recipe, way] = disturb(folder, prepare(folder), recipe, way, kills, draw)
        print(f"{recipe}, {way}: {dict(results[recipe, way])}", flush=True)
    print(table(results))
    if args.write:
        before, rest = OUT.read_text().split(BEGIN)
        OUT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
