"""Fine-tuning on conversations through the command line: what is scored in a real batch, and that a run resumes."""

import csv
import json
import random
import re
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = re.search(r"```yaml\n(# chat.yaml\n.*?)```", (ROOT / "docs" / "chat.md").read_text(), re.S)[1]
TEXTS = [
    *("how do I sort a list?", "Schrödinger’s Katze – naïve café", "今天天气怎么样？", "مرحبا بالعالم", "שלום עולם"),
    *("👩‍👩‍👧‍👦🏳️‍🌈🙂", "```python\nfor x in xs:\n    print(x)\n```\n", "", " ", "a\u2028b\u0085c\r\n\td"),
    *("E = mc², ∑ᵢ xᵢ ≤ ∞", "{% raw %}{{ x }}", "word " * 120, "1. one\n2. two\n\n| a | b |\n|---|---|\n"),
]


def conversation(number: int) -> list[dict[str, str]]:
    """Between one and three exchanges that begin with the conversation's number, some after a system prompt."""
    draw = random.Random(number)
    turns = [{"role": "system", "content": draw.choice(TEXTS)}] if number % 3 == 0 else []
    for exchange in range(draw.randint(1, 3)):
        asked = f"#{number}# " * (exchange == 0) + draw.choice(TEXTS)
        turns += [{"role": "user", "content": asked}] * draw.choice([1, 1, 1, 2])
        turns.append({"role": "assistant", "content": draw.choice(TEXTS)})
    return turns


ROW = 384
CHATS = [conversation(number) for number in range(240)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    shapes = [
        lambda turns: {"messages": turns},
        lambda turns: {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns], "id": 1},
    ]
    lines = [json.dumps(shapes[n % 2](turns), ensure_ascii=n % 5 == 0) for n, turns in enumerate(CHATS)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    return file


@pytest.fixture(scope="module")
def source(source_folder, tmp_path_factory) -> Path:
    """A source whose tokenizer knows the tokens of a ChatML template, in rows that the network has to spare."""
    folder = tmp_path_factory.mktemp("chat_source") / "source"
    shutil.copytree(source_folder(rows=310), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": ROW}))
    return folder


CATCHER = """
import lightning as L, torch
class Catch(L.Callback):
    def on_train_batch_start(self, trainer, recipe, batch, index):
        torch.save((tuple(batch), recipe.mask_id), f"batch_{index}.pt")
"""


@pytest.fixture
def words(source, chats, tmp_path, monkeypatch) -> list[str]:
    """A folder with a template, a callback that keeps batches, and the documents' example, cut to seconds."""
    shutil.copy(ROOT / "tests/data/templates/chatml.jinja", tmp_path)
    (tmp_path / "catcher.py").write_text(CATCHER)
    monkeypatch.syspath_prepend(tmp_path)
    checkpoints = (
        "{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2, keep: 9}}"
    )
    values = {
        "model.source": source,
        "data.paths": f"[{chats}]",
        "data.chat_template": "chatml.jinja",
        "data.row_length": ROW,
        "data.batch_size": 4,
        "data.val_rows": 4,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.log_every_n_steps": 1,
        "trainer.callbacks": f"[{{class_path: catcher.Catch}}, {checkpoints}]",
    }
    return [f"{key}={value}" for key, value in values.items()]


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize("tail", ["eos", "mask"])
@pytest.mark.parametrize("recipe", ["block_causal", "complementary_mask"])
def test_a_run_scores_the_answers_and_resumes(recipe, tail, typed, words, source, tmp_path):
    example = yaml.safe_load(EXAMPLE) | {"extends": str(ROOT / "recipes" / f"{recipe}.yaml")}
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(example))
    done = typed("fit", "chat.yaml", *words, f"data.tail={tail}", "--run", "whole", cwd=tmp_path)
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(source)
    lengths = []
    for step in range(4):
        batch, mask_id = torch.load(tmp_path / f"batch_{step}.pt")
        for ids_L, document_L, maskable_L in zip(batch[0], batch[2], batch[3], strict=True):
            for document in range(document_L.max() + 1):
                here_L = document_L == document
                check(tokenizer, ids_L[here_L].tolist(), maskable_L[here_L].tolist(), tail, mask_id)
                lengths.append(int(here_L.sum()))
    assert min(lengths) < max(lengths) == ROW and sum(length < ROW for length in lengths) > 8
    shutil.copytree(tmp_path / "whole", tmp_path / "died")
    shutil.rmtree(tmp_path / "died" / "checkpoints" / "step=4")
    (tmp_path / "elsewhere").mkdir()
    resumed = typed("resume", tmp_path / "died", cwd=tmp_path / "elsewhere")
    assert resumed.code == 0, resumed.err
    assert metrics(tmp_path / "died") == metrics(tmp_path / "whole")
    last = [tmp_path / run / "checkpoints" / "step=4" / "state.ckpt" for run in ("whole", "died")]
    weights = [torch.load(path)["state_dict"] for path in last]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def check(tokenizer, ids: list[int], maskable: list[bool], tail: str, mask_id: int) -> None:
    """One document of a batch against its conversation, by decoding: what is scored is each answer and its end.

    A document as long as the row may have been cut; as far as it goes, it must be the same.
    """
    whole, eos = len(ids) < ROW, tokenizer.eos_token_id
    text = tokenizer.decode(ids)
    turns = CHATS[int(re.search(r"#(\d+)#", text)[1])]
    scored = tokenizer.decode([id for id, m in zip(ids, maskable, strict=True) if m])
    shown = tokenizer.decode([id for id, m in zip(ids, maskable, strict=True) if not m])
    default = {"role": "system", "content": "You are a helpful assistant."}
    asked, answers, before = "", "", ""
    for turn in turns if turns[0]["role"] == "system" else [default, *turns]:
        asked += f"{before}<|im_start|>{turn['role']}\n"
        before = "<|im_end|>\n"
        if turn["role"] == "assistant":
            answers, before = answers + turn["content"] + "<|im_end|>", "\n"
        else:
            asked += turn["content"]
    if whole:
        assert len(ids) % 16 == 0
        end = text.rindex("<|im_end|>") + len("<|im_end|>")
        filling = text[end:]
        one = tokenizer.decode(eos)
        fills = len(ids) - len(tokenizer(text[:end], add_special_tokens=False)["input_ids"])
        assert 1 <= fills <= 16
        if tail == "eos":
            assert filling == one * fills
            answers += filling
        else:
            assert ids[-fills] == eos and ids[len(ids) - fills + 1 :] == [mask_id] * (fills - 1)
            answers, asked = answers + one, asked + filling.removeprefix(one)
        assert (scored, shown) == (answers, asked)
    else:
        assert answers.startswith(scored.rstrip("\ufffd")) or scored.startswith(answers)
        assert asked.startswith(shown.rstrip("\ufffd")) or shown.startswith(asked)


def test_a_run_refuses_malformed_lines_in_one_sentence(refused, words, tmp_path, chats):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text(encoding="utf-8") + "nonsense\n", encoding="utf-8")
    (tmp_path / "chat.yaml").write_text(EXAMPLE.replace("/path/to", str(ROOT)))
    sentence = refused("fit", "chat.yaml", *words, f"data.paths=[{bad}]", cwd=tmp_path)
    assert sentence.startswith(f"data: 1 of 241 records are malformed: {bad}:241 is not JSON")


def test_a_resume_with_another_tail_is_refused(typed, words, tmp_path):
    (tmp_path / "chat.yaml").write_text(EXAMPLE.replace("/path/to", str(ROOT)))
    assert typed("fit", "chat.yaml", *words, "--run", "run", cwd=tmp_path).code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step=4")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tail: eos", "tail: none"))
    said = typed("resume", "run", cwd=tmp_path)
    assert (said.code, said.err) == (1, "dlm: the checkpoint was made with data.tail eos, this run has none\n")


def test_urls_and_relative_files_are_kept_as_what_they_name(typed, words, chats, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/chats/train.jsonl", chats.read_bytes())
    shutil.copy(chats, tmp_path / "kept.jsonl")
    (tmp_path / "chat.yaml").write_text(EXAMPLE.replace("/path/to", str(ROOT)))
    paths = ["data.paths=[memory://chats]", "data.val_paths=[kept.jsonl]", "trainer.max_steps=1"]
    said = typed("fit", "chat.yaml", *words, *paths, "--run", "run", cwd=tmp_path)
    memory.rm("/chats", recursive=True)
    assert said.code == 0, said.err
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    assert data["paths"] == ["memory://chats"] and data["val_paths"] == [str(tmp_path / "kept.jsonl")]
    assert data["chat_template"] == str(tmp_path / "chatml.jinja") and data["hub"] is None


@pytest.fixture
def mixed(words, chats, corpus, tmp_path) -> list[str]:
    """Overrides for `mixed.yaml`: chats, one of them malformed, and texts in equal parts."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text(encoding="utf-8") + "nonsense\n", encoding="utf-8")
    chat = {"paths": [str(bad)], "chat_template": "chatml.jinja", "skip_malformed": True}
    parts = [
        {"class_path": "dlm_lightning.data.chat.Chat", "init_args": chat},
        {"class_path": "dlm_lightning.data.text_files.TextFiles", "init_args": {"paths": [str(corpus)]}},
    ]
    data = {"class_path": "dlm_lightning.data.mixture.Mixture", "init_args": {"parts": parts, "weights": [1, 1]}}
    recipe = {"extends": str(ROOT / "recipes" / "block_causal.yaml"), "data": data}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump(recipe).replace("skip_malformed: true", "turns: all"))
    return [word for word in words if word.split("=")[0] not in ("data.paths", "data.chat_template")]


def test_a_mixture_scores_the_answers_of_chats_and_all_of_texts(typed, mixed, corpus, source, tmp_path):
    said = typed("fit", "mixed.yaml", *mixed, "trainer.max_steps=2", "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [file.read_text() for file in corpus.iterdir()]
    kinds = {"chat": 0, "text": 0}
    for step in range(2):
        batch, mask_id = torch.load(tmp_path / f"batch_{step}.pt")
        for ids_L, document_L, maskable_L in zip(batch[0], batch[2], batch[3], strict=True):
            for document in range(document_L.max() + 1):
                here_L = document_L == document
                ids, maskable = ids_L[here_L].tolist(), maskable_L[here_L].tolist()
                if "<|im_start|>" in tokenizer.decode(ids):
                    check(tokenizer, ids, maskable, "eos", mask_id)
                    kinds["chat"] += 1
                else:
                    assert maskable == [False, *[True] * (len(ids) - 1)]
                    text = tokenizer.decode(ids, skip_special_tokens=True)
                    assert any(text in whole for whole in texts)
                    kinds["text"] += 1
    assert kinds["chat"] > 3 and kinds["text"] > 3
    lines = said.out.splitlines()
    malformed = f"data: 1 of 241 records are malformed: {tmp_path}/bad.jsonl:241 is not JSON: "
    assert sum(line.startswith(malformed) and line.endswith("; they are left out") for line in lines) == 1
    [start] = [n for n, line in enumerate(lines) if line.startswith("data: ") and " rows of " in line]
    for number, (kind, documents) in enumerate([("Chat", 228), ("TextFiles", 5)]):
        said_of_it = rf"  part {number}, {kind}: {documents} documents, [\d,]+ tokens in \d+ rows of {ROW}, .* full; "
        assert re.match(said_of_it + r"\d+ draws per epoch \(\d+.\d%\)$", lines[start + 1 + number])


def test_malformed_lines_of_a_part_are_named_with_the_part(refused, mixed, tmp_path):
    sentence = refused("fit", "strict.yaml", *mixed, cwd=tmp_path)
    assert sentence.startswith(f"data.parts.0: data: 1 of 241 records are malformed: {tmp_path}/bad.jsonl:241 is not")
