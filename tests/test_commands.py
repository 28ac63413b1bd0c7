"""Every `dlm` command of README and documents runs as it stands there, on small models where all that it names is."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEANT = {  # by the words that stand for something
    "RECIPE": "block_causal", "RUN": "runs/block_causal/1", "SOURCE": "path/to/qwen3", "FOLDER": "path/to/sdar",
    "A": "runs/ar_source/1", "B": "runs/block_causal/1", "N": "1", "123": "1", "CLASS": "BlockCausal",
}  # fmt: skip
ELSEWHERE = {  # what begins so, and why it is not run here
    "fit path/to/strided.yaml": "tests/test_training.py runs it",
    "fit path/to/chat.yaml": "tests/data/test_chat.py runs one",
    "fit mine/": "tests/test_plugins.py runs it",
    "generate runs/mine": "tests/test_plugins.py runs it",
    "compare": "tests/test_comparison.py runs one",
    "eval RUN --tasks": "the tasks are the hub's; tests/test_harness.py runs tasks of its own",
    "fit RECIPE data.class_path=dlm_lightning.data.hub_text.HubText": "a set of the hub",
    "resume RUN": "the run here is finished; tests/test_training.py and test_elastic.py resume others",
    "bench complementary_mask --baseline peers --growth": "minutes, for rows of up to 8,192 tokens",
}
SMALL = [
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto",
    "trainer.precision=32-true", "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1",
    "trainer.accumulate_grad_batches=1", "data.paths=[my/texts]", "data.row_length=64", "data.batch_size=2",
    "data.val_rows=2", "data.val_share=0.2",
]  # fmt: skip
TINY = "{model_type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, \
num_key_value_heads: 2, head_dim: 8}"


def commands(document: Path) -> list[str]:
    """The commands of a document's indented lines, without what is said of them."""
    text = re.sub(r"\\\n\s*", "", document.read_text())
    found = []
    for line in re.findall(r"^    (?:\.venv/bin/)?dlm ([^\n]+)$", text, re.M):
        line = re.split(r"\s{2,}| # ", line.strip())[0]  # an explanation stands apart
        line = re.sub(r" \[(?:key|--)[^\]]*\]", "", line)  # and what may be left out in brackets
        found.append(line.split(" | ")[0].replace("…", "").strip())
    return found


@pytest.fixture(scope="module")
def place(source_folder, corpus, typed, tmp_path_factory) -> Path:
    """A folder with the sources, texts and runs that documents speak of."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "path" / "to").mkdir(parents=True)
    shutil.copytree(corpus, folder / "my" / "texts")
    tokenizer = AutoTokenizer.from_pretrained(source_folder("qwen3"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim_pad|>"]})
    for name, family, keys in (
        ("qwen3", "qwen3", {}),
        ("sdar", "qwen3", {"model_type": "sdar", "block_size": 4}),
        ("fast_dllm_v2", "qwen2", {"model_type": "Fast_dLLM_Qwen", "bd_size": 8}),
        ("dream", "qwen2", {"model_type": "Dream", "mask_token_id": 310}),
    ):
        rows = 151936 if name in ("sdar", "fast_dllm_v2") else 320
        own = shutil.copytree(source_folder(family, rows=rows), folder / "path" / "to" / name)
        values = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(values | keys))
        if name == "qwen3":
            tokenizer.save_pretrained(own)
    (folder / "prompts.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "brown fox"}\n')
    for words in (
        ("fit", "ar_source", *SMALL, f"model.config={TINY}", "data.vocab_size=300"),
        ("fit", "block_causal", *SMALL, "trainer.max_steps=3"),
        ("import", "path/to/sdar", "--run", "runs/for_sdar"),
        ("import", "path/to/fast_dllm_v2", "--run", "runs/for_fast_dllm_v2"),
    ):
        said = typed(*words, cwd=folder)
        assert said.code == 0, said.err
    return folder


def words_of(command: str, out: str) -> list[str]:
    """What is typed for a command: names for what stands for something, small for large."""
    name, *words = shlex.split(command)
    form = command.rpartition("--as ")[2].strip() if "--as " in command else ""
    meant = MEANT | {"OUT": out} | ({"RUN": f"runs/for_{form}"} if form in ("sdar", "fast_dllm_v2") else {})
    words = [meant.get(word, word) for word in words if word != "trainer.accelerator=gpu"]
    if name == "fit":
        recipe, *words = words
        hub = re.search(r"qwen(2_5|3)_", recipe) or "model.source=Qwen/Qwen3-0.6B" in words
        words = [word for word in words if not word.startswith("model.source=Qwen/")]
        given = [word.split("=")[0] for word in words]
        small = [word for word in SMALL if word.split("=")[0] not in given]
        source = ["model.source=path/to/qwen3"] if hub and "model.source" not in given else []
        scratch = recipe == "ar_source" and "model.source" not in given
        return [name, recipe, *small, *source, *([f"model.config={TINY}"] if scratch else []), *words]
    if name == "bench":
        own = [word for word in ("data.row_length=64", "data.batch_size=2") if word.split("=")[0] not in command]
        tiny = [f"model.config={TINY}"] if "ar_source" in words or "model.source=null" in words else []
        words = [word for word in words if not word.startswith("model.config=")]
        return [name, *words, *own, *tiny, "--turns", "1"]
    more = {
        "consolidate": ["--out", out],
        "probe": ["data.paths=[my/texts]"],
        "eval": [
            "--prompts",
            "2",
            "data.paths=[my/texts]",
            "data.row_length=64",
            "data.val_rows=2",
            "data.batch_size=2",
        ],
        "plan": SMALL,
    }
    return [name, *words, *more.get(name, [])]


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands(d)], ids=lambda path: path.name)
def test_its_commands_run(document, place, typed, monkeypatch, tmp_path):
    """In a folder of its own: another document's commands may make the same runs."""
    place = shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(place)
    failed = {}
    for number, command in enumerate(commands(document)):
        if any(command.startswith(beginning) for beginning in ELSEWHERE):
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("the quick\n"))
        said = typed(*words_of(command, f"out-{document.stem}-{number}"), cwd=place)
        if said.code:
            failed[command] = said.err.strip()[-400:]
    assert not failed


def test_what_is_left_out_is_there():
    """A reason for nothing would hide the next command that begins so."""
    every = [command for document in DOCUMENTS for command in commands(document)]
    assert len(every) > 60
    for beginning in ELSEWHERE:
        assert any(command.startswith(beginning) for command in every), beginning
