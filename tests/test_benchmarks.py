"""Commands of documents that are not `dlm`'s: benchmarks run as they stand there, but small; others run elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/results").glob("*.md"))]
ELSEWHERE = {  # what begins so, and who runs it
    "make demo": "continuous integration",
    "make test": "continuous integration",
    "make docs": "tests/test_documents.py builds the site",
    "make fuzz": "tests/test_fuzz.py, with fewer cases",
    "make study": "its lines of the Makefile are run here",
    "pip install": "the environment of these tests has the extra",
    "torchrun --nproc_per_node 4 -m dlm_lightning.cli eval": "tests/test_harness.py, on two ranks",
    "torchrun": "tests/test_launchers.py, on fewer ranks",
    "sbatch": "tests/test_launchers.py runs the script, under a SLURM of a few lines",
    "python benchmarks/speed.py gpu": "it needs a GPU",
}
TINY = "{model_type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, \
num_key_value_heads: 2, head_dim: 8}"
TASKS = "dlm_lightning.data.exact_answers.ExactAnswers"
PART = f"{{class_path: {TASKS}, init_args: {{tasks: [copy, reverse, sort, close], samples: 400, multiple: 32}}}}"
SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
ROWS = ["data.batch_size=2", "data.row_length=64", "data.val_rows=4"]
TEXTS = ["data.paths=[my/texts]", "data.val_share=0.2", *ROWS]
MIXED = [f"data.parts=[{PART}]", "data.weights=[1]", "data.batch_size=2", "data.val_rows=4"]
HERE = ["--out", "docs/results"]  # a trial names its own
SMALL = {  # beside what stands there
    "conversion.py": ["--seeds", "1", *SHORT, *TEXTS],
    "decode.py": ["--prompts", "1", "--lengths", "64"],
    "decode.py --fit": [*SHORT, "data.samples=400", "data.batch_size=2", "data.val_rows=4"],
    "head.py": ["--turns", "2", "--tokens", "64", *HERE],
    "memory.py": [f"model.config={TINY}", "data.vocab_size=300", *TEXTS],
    "soak.py": ["--steps", "20", "--every", "5"],
    "speed.py cpu": ["--turns", "1", f"model.config={TINY}", "data.row_length=64", *HERE],
    "speed.py growth": ["--turns", "1", f"model.config={TINY}", "--only", "documents", *HERE],  # not long rows
    "study.py": ["--seeds", "1", *SHORT, *MIXED],
    "views.py": ["--pairs", "1", "--draws", "2", "--repeats", "1", *TEXTS],
}
FIRST = ("sources", "--fit")  # what others need


def commands(text: str) -> list[str]:
    """Commands of indented lines that are not `dlm`'s, without what is said of them."""
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"^    ((?:make|pip|python|sbatch|torchrun) [^\n]+)$", text, re.M)
    return [re.split(r"\s{2,}| # ", line)[0].strip() for line in found]


def benchmarks() -> list[str]:
    """Their commands in documents, and those of the study in the Makefile, what others need first."""
    makefile = (ROOT / "Makefile").read_text().replace("\t$(BIN)/", "    ")
    found = [command for document in DOCUMENTS for command in commands(document.read_text())]
    found += [command for command in commands(makefile) if "study.py" in command]
    found = [command for command in found if command.startswith("python") and not elsewhere(command)]
    return sorted(dict.fromkeys(found), key=lambda command: not command.endswith(FIRST))


def elsewhere(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in ELSEWHERE)


@pytest.fixture(scope="module")
def place(corpus, typed, tmp_path_factory) -> Path:
    """A folder with the benchmarks, the pages they write to, texts, and the source of `make demo`."""
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copytree(corpus, folder / "my" / "texts")
    for name in ("benchmarks", "docs/results", "recipes", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    said = typed("fit", "ar_source", f"model.config={TINY}", "data.vocab_size=300", *SHORT, *TEXTS, cwd=folder)
    assert said.code == 0, said.err
    return folder


def words_of(command: str) -> list[str]:
    """What is typed for a command: what stands there and then what makes it small; the last of two words holds."""
    _, script, *words = command.split()
    name = Path(script).name
    return [script, *words, *SMALL.get(" ".join([name, *words[:1]]), SMALL.get(name, []))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", sorted({command.split()[1] for command in benchmarks()}))
def test_benchmarks_run(script, place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for command in (command for command in benchmarks() if command.split()[1] == script):
        done = subprocess.run(
            [sys.executable, *words_of(command)], cwd=place, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-1500:]}"


def test_every_command_has_one_who_runs_it():
    every = [command for document in DOCUMENTS for command in commands(document.read_text())]
    assert len(every) > 25
    assert not [command for command in every if command not in benchmarks() and not elsewhere(command)]
    for beginning in ELSEWHERE:  # a reason for nothing would hide the next command that begins so
        assert any(command.startswith(beginning) for command in every), beginning
