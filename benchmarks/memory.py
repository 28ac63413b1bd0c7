"""Does `dlm plan` say how much memory a run takes? Plan and measurement for the three patterns, on this machine's CPU.

    python benchmarks/memory.py                          # writes the table of docs/results/plan.md
    python benchmarks/memory.py --out table.md           # writes the table somewhere else

Each run is a process of its own: a few optimizer steps with random weights, its peak resident memory above what it
held just before the network was built. It is made under glibc's defaults, and again with MALLOC_MMAP_THRESHOLD_, so
that memory that is freed goes back to the system at once and fragments of it are not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "plan.md"
RECIPES = ("full_bidirectional", "block_causal", "complementary_mask")
STEPS = 3
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes from which a piece of memory is the system's own
CONFIG = (
    "{model_type: qwen3, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 4, num_attention_heads: 16, "
    "num_key_value_heads: 8, head_dim: 64, tie_word_embeddings: true}"
)
WORDS = [
    *("model.source=null", f"model.config={CONFIG}", "data.vocab_size=2048", "data.batch_size=4"),
    *(f"trainer.max_steps={STEPS}", "trainer.limit_val_batches=0", "trainer.callbacks=[]", "trainer.logger=false"),
]


def peak(recipe: str, words: list[str]) -> int:
    """Bytes that training takes in this process above what it holds when the network is about to be built."""
    from dlm_lightning import training
    from dlm_lightning.module import Recipe

    before: list[int] = []
    build = Recipe.configure_model

    def configure_model(recipe: Recipe) -> None:
        before.append(resident("VmRSS"))
        build(recipe)

    Recipe.configure_model = configure_model
    with tempfile.TemporaryDirectory() as folder:
        training.fit(recipe, [*words, "trainer.enable_progress_bar=false"], f"{folder}/run", None)
    return resident("VmHWM") - before[0]


def resident(what: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def measured(recipe: str, words: list[str], environment: dict[str, str]) -> int:
    """`peak` in a fresh process."""
    command = [sys.executable, __file__, "--recipe", recipe, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def table() -> str:
    """The Markdown table, plan and measurement in MiB."""
    from dlm_lightning.plan import plan

    lines = ["| recipe | plan | measured | error | with glibc's defaults | error |", "|---|---|---|---|---|---|"]
    for recipe in RECIPES:
        expected = plan(recipe, WORDS).memory.peak
        cells = [f"{expected / 2**20:.0f}"]
        for environment in (RETURNED, {}):
            found = measured(recipe, WORDS, environment)
            cells += [f"{found / 2**20:.0f}", f"{expected / found - 1:+.1%}"]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file whose table is replaced")
    parser.add_argument("--recipe", help="measure one recipe in this process and print bytes")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.recipe:
        print(peak(args.recipe, args.words))
        return
    text = args.out.read_text() if args.out.is_file() else "<!-- table -->\n<!-- end -->\n"
    before, rest = text.split("<!-- table -->")
    after = rest.split("<!-- end -->")[1]
    found = table()
    args.out.write_text(f"{before}<!-- table -->\n{found}\n<!-- end -->{after}")
    print(found)


if __name__ == "__main__":
    main()
