"""Does `dlm plan` say how much memory a run takes? Plan and measurement for three patterns and other shapes, on a CPU.

    python benchmarks/memory.py                          # writes the table of docs/results/plan.md
    python benchmarks/memory.py --out table.md           # writes the table somewhere else

Plan and run are processes of their own, with random weights and without any MALLOC_ variable. A short run tells which
modules training imports; the measured one imports them all, and what counts is its peak resident memory above that.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "plan.md"
STEPS = 6
CONFIG = (
    "{model_type: qwen3, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 4, num_attention_heads: 16, "
    "num_key_value_heads: 8, head_dim: 64, tie_word_embeddings: true}"
)
WORDS = [
    *("model.source=null", f"model.config={CONFIG}", "data.vocab_size=2048", "data.batch_size=4"),
    *("trainer.limit_val_batches=0", "trainer.callbacks=[]", "trainer.logger=false"),
]
RECIPES = ("full_bidirectional", "block_causal", "complementary_mask")
SHAPES: list[tuple[str, list[str]]] = [  # beside those of WORDS
    *((recipe, []) for recipe in RECIPES),
    ("block_causal", ["trainer.precision=bf16-mixed"]),
    ("block_causal", ["model.activation_checkpointing=true", "data.batch_size=8"]),
    ("full_bidirectional", ["model.config.hidden_size=512", "model.config.num_hidden_layers=8"]),
    ("full_bidirectional", ["data.vocab_size=16384", "data.batch_size=16"]),
]


def fit(recipe: str, words: list[str], steps: int) -> None:
    """Train in this process."""
    from dlm_lightning import training

    with tempfile.TemporaryDirectory() as folder:
        short = [f"trainer.max_steps={steps}", "trainer.enable_progress_bar=false"]
        training.fit(recipe, [*words, *short], f"{folder}/run", None)


def peak(recipe: str, words: list[str], modules: list[str]) -> tuple[int, int]:
    """Bytes that training takes in this process above its imports, and how many of them before there is a network."""
    for module in modules:
        with suppress(ImportError, AttributeError):  # a few are made up by others when they are imported
            importlib.import_module(module)
    from dlm_lightning.module import Recipe

    before: list[int] = []
    build = Recipe.configure_model

    def configure_model(recipe: Recipe) -> None:
        before.append(resident("VmRSS"))
        build(recipe)

    Recipe.configure_model = configure_model
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    level = resident("VmRSS")
    fit(recipe, words, STEPS)
    return resident("VmHWM") - level, before[0] - level


def resident(what: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def process(what: str, recipe: str, words: list[str], said: str = "") -> str:
    """The last line that this file prints in a fresh process."""
    command = [sys.executable, __file__, "--what", what, "--recipe", recipe, *words]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, check=True, input=said, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout.splitlines()[-1]


def planned(recipe: str, words: list[str]) -> int:
    """The peak that a plan names, in bytes."""
    return int(process("plan", recipe, words))


def measured(recipe: str, words: list[str]) -> tuple[int, int]:
    """`peak` in a fresh process."""
    found = process("peak", recipe, words, said=process("modules", recipe, words)).split()
    return int(found[0]), int(found[1])


def table(trial: list[str]) -> str:
    """The Markdown table, plan and measurement in MiB."""
    lines = [
        "| recipe | other than above | plan | measured | error | before the network |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, more in SHAPES:
        words = [*WORDS, *more, *trial]
        expected = planned(recipe, words)
        found, before = measured(recipe, words)
        other = "<br>".join(f"`{word}`" for word in more)
        sizes = [f"{size / 2**20:.0f}" for size in (expected, found)]
        lines.append(
            f"| `{recipe}` | {other} | {' | '.join(sizes)} | {expected / found - 1:+.1%} | {before / 2**20:.0f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file whose table is replaced")
    parser.add_argument("--what", choices=("plan", "modules", "peak"), help="print one thing about one --recipe")
    parser.add_argument("--recipe")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of all runs, for a trial")
    args = parser.parse_intermixed_args()
    if args.what == "plan":
        from dlm_lightning.plan import plan

        print(plan(args.recipe, args.words).memory.peak)
    elif args.what == "modules":
        fit(args.recipe, args.words, steps=1)
        print(" ".join(name for name in sys.modules if name != "__main__"))
    elif args.what == "peak":
        print(*peak(args.recipe, args.words, sys.stdin.read().split()))
    else:
        text = args.out.read_text() if args.out.is_file() else "<!-- table -->\n<!-- end -->\n"
        before, rest = text.split("<!-- table -->")
        after = rest.split("<!-- end -->")[1]
        args.out.write_text(f"{before}<!-- table -->\n{table(args.words)}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
