"""Any text set that `datasets` loads: here local ones, which go through the same call; mapped and streamed alike."""

import json
import os
import subprocess
import sys

import datasets
import pytest

from dlm_lightning.data.hub_text import HubText

TRAIN = [f"document {n} of some length" for n in range(40)]
TEST = [f"held out {n}" for n in range(6)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def sets(tmp_path):
    """One set as a folder of JSON lines, as a folder of Parquet, and by format and file: what each is asked for by."""
    for name, texts in {"train": TRAIN, "test": TEST}.items():
        records = [{"text": text, "body": text.upper(), "number": n} for n, text in enumerate(texts)]
        (tmp_path / "lines").mkdir(exist_ok=True)
        (tmp_path / "lines" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        (tmp_path / "tables").mkdir(exist_ok=True)
        datasets.Dataset.from_list(records).to_parquet(tmp_path / "tables" / f"{name}.parquet")
    return {
        "lines": {"path": str(tmp_path / "lines")},
        "tables": {"path": str(tmp_path / "tables")},
        "files": {"path": "json", "data_files": str(tmp_path / "lines" / "train.jsonl")},
    }


KINDS = pytest.mark.parametrize("kind", ["lines", "tables", "files"])
HOW = pytest.mark.parametrize("how", [{}, {"streaming": True, "documents": 1000}], ids=["mapped", "streamed"])


def texts(data, *splits):
    return [span.text for split in splits for [span] in data.texts(split)]


@KINDS
@HOW
def test_every_document_is_in_one_split(sets, kind, how):
    data = HubText(**sets[kind], val_share=0.1, **how)
    assert texts(data, "val") == TRAIN[9::10]
    assert sorted(texts(data, "train", "val")) == sorted(TRAIN)


@HOW
def test_a_split_of_its_own_for_validation(sets, how):
    data = HubText(**sets["lines"], val_split="test", **how)
    assert (texts(data, "train"), texts(data, "val")) == (TRAIN, TEST)


@pytest.mark.parametrize("streaming", [False, True])
def test_as_many_documents_as_asked_for(sets, streaming):
    def few(**options):
        return HubText(**sets["lines"], streaming=streaming, documents=5, **options)

    assert texts(few(val_share=0.2), "train", "val") == TRAIN[:5]
    assert texts(few(val_split="test"), "val") == TEST[:5]


def test_the_text_key_names_the_column(sets):
    assert texts(HubText(**sets["tables"], text_key="body", val_split="test"), "val") == [t.upper() for t in TEST]


@KINDS
def test_mapped_and_streamed_give_the_same_rows(sets, kind, ready, tmp_path):
    def rows(**how):
        options = {"row_length": 16, "vocab_size": 270, "cache_dir": str(tmp_path / "cache")}
        data = ready(HubText(**sets[kind], **options, **how), tokenizer=None)
        return [[{k: v.tolist() for k, v in row.items()} for row in data.rows[split]] for split in ("train", "val")]

    mapped, streamed = rows(), rows(streaming=True, documents=40)
    assert mapped == streamed and len(mapped[0]) > 10 and len(mapped[1]) > 0
    assert len(list((tmp_path / "cache" / "rows").glob("*-train.json"))) == 2  # each was read


STREAMED = {"streaming": True, "documents": 1000}


@HOW
def test_identity_follows_the_keys(sets, how):
    options = [{}, {"val_split": "test"}, {"text_key": "body"}, {"documents": 7}, {"val_share": 0.5}]
    seen = [HubText(**{**sets["lines"], **how, **option}).identity() for option in options]
    assert len(set(seen)) == len(seen)


def test_identity_is_the_same_in_another_process(sets, tmp_path):
    """With a cache of its own, as on another machine."""
    both = [{**sets["lines"], **how} for how in ({}, STREAMED)]
    code = f"from dlm_lightning.data.hub_text import HubText\nfor keys in {both!r}: print(HubText(**keys).identity())"
    path = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [HubText(**keys).identity() for keys in both]


def test_identity_of_a_mapped_set_follows_its_files(sets, tmp_path):
    before = HubText(**sets["lines"]).identity()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "a", "body": "A", "number": 0}')
    assert HubText(**sets["lines"]).identity() != before


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"path": "nobody/nothing"}, "data.path: nobody/nothing, split train, cannot be loaded: Couldn't reach"),
        ({"split": "dev"}, 'split dev, cannot be loaded: Unknown split "dev". Should be one of'),
        ({"val_split": "dev"}, "split dev, cannot be loaded"),
        ({"split": "dev", "streaming": True, "documents": 9}, "split dev, cannot be loaded: Bad split: dev"),
        ({"name": "english"}, "cannot be loaded: BuilderConfig 'english' not found"),
        ({"text_key": "content"}, "lines:1 has no content, which data.text_key asks for; it has text, body, number"),
        ({"text_key": "number"}, r"lines:1 has a number \(data.text_key\) that is a number, not text"),
        ({"text_key": "content", "streaming": True, "documents": 9}, "lines:1 has no content"),
    ],
)
def test_what_is_not_there_is_named(sets, keys, says):
    with pytest.raises(ValueError, match=says):
        texts(HubText(**{**sets["lines"], **keys}), "train", "val")


def test_a_malformed_file_is_named_with_its_reason(tmp_path):
    (tmp_path / "broken.json").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"data.path: json, split train, cannot be loaded: .*(JSON|json)"):
        texts(HubText("json", data_files=str(tmp_path / "broken.json")), "train")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"streaming": True}, "data.documents must say how many to read with data.streaming"),
        ({"documents": 0}, "data.documents must be at least 1, not 0"),
        ({"val_share": 1.0}, "data.val_share must lie between 0 and 1, not 1.0"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, says):
    with pytest.raises(ValueError, match=says):
        HubText("some/set", **keys)


def test_a_config_holds_absolute_local_paths(monkeypatch, sets, tmp_path):
    monkeypatch.chdir(tmp_path)

    def pinned(**keys):
        held = {**keys, "cache_dir": None}
        HubText(**keys).pin(held)
        return held["path"], held.get("data_files")

    assert pinned(path="lines", data_files="train.jsonl") == (str(tmp_path / "lines"), "train.jsonl")
    assert pinned(path="json", data_files="a.jsonl") == ("json", [str(tmp_path / "a.jsonl")])
    assert pinned(path="json", data_files=["a.jsonl", "s3://b/c"]) == ("json", [str(tmp_path / "a.jsonl"), "s3://b/c"])
    assert pinned(path="user/set", data_files="train.jsonl") == ("user/set", "train.jsonl")
