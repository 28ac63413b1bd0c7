"""Which files are documents, and in which split."""

import json
import os
from itertools import pairwise

import fsspec
import pytest

from dlm_lightning.data.files import SAMPLE
from dlm_lightning.data.text_files import TextFiles


@pytest.fixture
def folder(tmp_path):
    """Twenty text files over two folders, and one that is not text."""
    for n in range(20):
        file = tmp_path / "texts" / "ab"[n % 2] / f"{n}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text {n}")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "texts"


def names(data):
    return [file.name for file in data.files[0]]


def texts(data, *splits):
    return [span.text for split in splits for [span] in data.texts(split)]


def test_the_default_is_the_standard_library_without_its_tests_and_tables():
    data = TextFiles()
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py", "unittest/case.py"} <= set(names(data))
    folders = {folder for name in names(data) for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    assert all(name.endswith(".py") for name in names(data))
    sizes = [len(text) for text in texts(data, "val")]
    assert len(sizes) > 20 and max(sizes) < 0.5 * sum(sizes)  # no one file decides what validation says


def test_every_file_is_in_one_split(folder):
    data = TextFiles([str(folder)], val_share=0.25)
    assert len(texts(data, "val")) == 5
    assert sorted(texts(data, "train", "val")) == sorted(f"text {n}" for n in range(20))


def test_names_are_paths_below_the_folder_of_all_files(folder):
    assert names(TextFiles([str(folder)])) == sorted(f"{'ab'[n % 2]}/{n}.txt" for n in range(20))
    assert names(TextFiles([str(folder / "a" / "0.txt"), str(folder / "b")]))[0] == "a/0.txt"


def test_the_split_depends_on_names_alone(folder, tmp_path):
    before = TextFiles([str(folder)])
    read = texts(before, "train"), texts(before, "val")
    moved = folder.rename(tmp_path / "elsewhere")
    after = TextFiles([str(moved)], seed=7)
    assert (texts(after, "train"), texts(after, "val")) == read
    assert after.identity() == TextFiles([str(moved)]).identity()


def test_the_split_is_the_same_on_every_machine(folder):
    """Pinned: no order of the file system, no seed of Python's own hash."""
    assert texts(TextFiles([str(folder)], val_share=0.25), "val") == [f"text {n}" for n in (15, 6, 2, 19, 18)]


def test_the_split_takes_from_all_over_the_names(folder):
    kept = {int(text.split()[1]) for text in texts(TextFiles([str(folder)], val_share=0.5), "val")}
    assert kept not in ({*range(10)}, {*range(10, 20)}, {*range(0, 20, 2)}, {*range(1, 20, 2)})


@pytest.mark.parametrize(
    ("patterns", "count"),
    [(["*/1*.txt"], 11), (["**/*.txt"], 20), (["a", "b/1*.txt"], 16), (["a/0.txt", "b/1.txt"], 2), (["?"], 20)],
)
def test_files_folders_and_globs(folder, patterns, count):
    assert len(names(TextFiles([str(folder / pattern) for pattern in patterns]))) == count


def test_a_file_that_is_named_twice_is_one_document(folder, monkeypatch):
    """Otherwise it could be trained on and validated on."""
    monkeypatch.chdir(folder)
    twice = [str(folder), "a/*.txt", "b/../a/0.txt", str(folder / "a")]
    assert TextFiles(twice).files == TextFiles([str(folder)]).files


def test_files_of_one_name_in_two_folders_are_two_documents(folder):
    for part in "ab":
        (folder / part / "same.txt").write_text(part)
    data = TextFiles([str(folder / part / "same.txt") for part in "ab"])
    assert sorted(texts(data, "train", "val")) == ["a", "b"]


def test_relative_paths_and_home(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = TextFiles([str(folder)]).files
    assert TextFiles(["texts"]).files == TextFiles(["~/texts"]).files == expected


def test_brackets_in_the_name_of_a_file_are_no_glob(folder):
    (folder / "a" / "[1].txt").write_text("brackets")
    data = TextFiles([str(folder / "a" / "[1].txt"), str(folder / "b")])
    assert "brackets" in texts(data, "train", "val")


def test_suffixes_choose_the_files_of_a_folder_and_not_what_is_named(folder):
    assert "picture.png" not in names(TextFiles([str(folder)]))
    assert "picture.png" in names(TextFiles([str(folder / "*.png"), str(folder)]))
    assert names(TextFiles([str(folder), str(folder / "a" / "0.txt")], suffixes=(".png",))) == [
        "a/0.txt",
        "picture.png",
    ]


def test_undecodable_bytes_are_replaced(folder):
    (folder / "a" / "0.txt").write_bytes(b"caf\xe9 \xff")
    assert "caf\ufffd \ufffd" in texts(TextFiles([str(folder)]), "train", "val")


def test_an_empty_file_is_no_document(folder):
    (folder / "a" / "0.txt").write_text("")
    assert len(texts(TextFiles([str(folder)]), "train", "val")) == 19


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_split_keeps_a_file(folder, share):
    data = TextFiles([str(folder / "a" / "0.txt"), str(folder / "b" / "1.txt")], val_share=share)
    assert len(texts(data, "train")) == len(texts(data, "val")) == 1


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/*.txt", "a/*.md"])
def test_a_path_that_matches_nothing_is_named(folder, missing):
    with pytest.raises(FileNotFoundError, match="data.paths: nothing matches .*" + missing.replace("*", r"\*")):
        _ = TextFiles([str(folder), str(folder / missing)]).files


@pytest.mark.parametrize("val_paths", [None, ["a"]])
def test_no_paths_are_refused(folder, monkeypatch, val_paths):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"^data.paths: no file is named to train on; data.val_paths names"):
        _ = TextFiles([], val_paths=val_paths).files


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_outside_0_and_1_is_refused(share):
    with pytest.raises(ValueError, match=r"data.val_share must lie between 0 and 1"):
        TextFiles(val_share=share)


def test_identity_follows_the_content_and_not_the_times(folder):
    def identity(**options):
        return TextFiles([str(folder)], **options).identity()

    file = folder / "a" / "0.txt"
    seen = [identity(), identity(val_share=0.2), identity(text_key="other"), identity(val_paths=[str(file)])]
    os.utime(file, ns=(0, 1))
    assert identity() == seen[0]
    for content in ("text 1", "longer than it was"):  # the first is no longer
        file.write_text(content)
        seen.append(identity())
    file.rename(folder / "a" / "renamed.txt")
    seen.append(identity())
    assert len(set(seen)) == 7 and identity() == seen[-1]


@pytest.mark.parametrize("place", [0, 50_000, 100_000, 250_000, 499_999])
def test_identity_samples_a_long_file_at_its_beginning_middle_and_end(folder, place):
    """Where it does not look, only a change of the size is seen."""
    file = folder / "a" / "0.txt"
    content = bytearray(b"x" * 500_000)
    file.write_bytes(content)
    before = TextFiles([str(folder)]).identity()
    content[place] = ord("y")
    file.write_bytes(content)
    looked_at = min(abs(place - start) for start in (0, 250_000, 500_000)) < SAMPLE / 2 or place < SAMPLE
    assert (TextFiles([str(folder)]).identity() != before) == looked_at


def test_a_changed_file_is_read_again(folder, ready, tmp_path):
    def decoded():
        data = TextFiles([str(folder)], vocab_size=300, row_length=16, cache_dir=str(tmp_path / "cache"))
        ready(data, tokenizer=None)
        return "".join(data.tokenizer.decode(row["ids"]) for split in data.rows.values() for row in split)

    assert "text 4" in decoded()
    (folder / "a" / "4.txt").write_text("word 4")
    assert "text 4" not in decoded() and "word 4" in decoded()


# Records


@pytest.fixture
def records(tmp_path):
    """`records("a.jsonl", 40)`: a file of so many records below tmp_path."""

    def write(name, count):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps({"text": f"{path.name} {n}", "body": f"body {n}"}) for n in range(count)))
        return str(path)

    return write


def test_one_file_of_records_is_enough_for_both_splits(records):
    data = TextFiles([records("a.jsonl", 100)], val_share=0.1)
    train, val = texts(data, "train"), texts(data, "val")
    assert len(val) == 10 and sorted(train + val) == sorted(f"a.jsonl {n}" for n in range(100))
    numbers = [int(text.split()[1]) for text in val]
    assert {b - a for a, b in pairwise(numbers)} == {10}


def test_small_files_of_records_give_their_share_together(records, tmp_path):
    """By itself each has fewer records than one of twenty needs."""
    for n in range(100):
        records(f"many/{n}.jsonl", 4)
    data = TextFiles([str(tmp_path / "many")])
    assert 10 <= len(texts(data, "val")) <= 30 and len(texts(data, "train", "val")) == 400


def test_a_record_stays_in_its_split_when_files_are_added(records, tmp_path):
    before = texts(TextFiles([records("more/a.jsonl", 60), records("more/b.jsonl", 60)]), "val")
    records("more/c.jsonl", 60)
    assert set(before) < set(texts(TextFiles([str(tmp_path / "more")]), "val"))


def test_texts_and_records_go_together(folder, records):
    data = TextFiles([str(folder), records("a.jsonl", 40)], val_share=0.25)
    assert texts(data, "train") and len(texts(data, "val")) == 5 + 10
    assert len(set(texts(data, "train", "val"))) == 60


def test_the_text_key_names_the_column(records):
    data = TextFiles([records("a.jsonl", 40)], text_key="body")
    assert sorted(texts(data, "train", "val")) == sorted(f"body {n}" for n in range(40))


def test_an_empty_record_is_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    assert sorted(texts(TextFiles([str(tmp_path / "a.jsonl")]), "train", "val")) == ["a", "b"]


# Explicit validation files


def test_val_paths_are_validated_on_and_all_else_is_trained_on(folder, records):
    held_out = [str(folder / "a" / "0.txt"), records("val.jsonl", 3)]
    data = TextFiles([str(folder), records("train.jsonl", 30)], val_paths=held_out)
    assert sorted(texts(data, "val")) == ["text 0", *(f"val.jsonl {n}" for n in range(3))]
    assert sorted(texts(data, "train")) == sorted(
        [*(f"text {n}" for n in range(1, 20)), *(f"train.jsonl {n}" for n in range(30))]
    )


def test_a_single_text_beside_val_paths_is_enough(folder):
    data = TextFiles([str(folder / "a" / "0.txt")], val_paths=[str(folder / "b" / "1.txt")])
    assert (texts(data, "train"), texts(data, "val")) == (["text 0"], ["text 1"])


def test_val_paths_go_with_the_standard_library(folder):
    data = TextFiles(val_paths=[str(folder)])
    assert sorted(texts(data, "val")) == sorted(f"text {n}" for n in range(20))
    assert len(texts(data, "train")) > 100


def test_missing_val_paths_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"data.val_paths: nothing matches .*none"):
        texts(TextFiles([str(folder)], val_paths=[str(folder / "none")]), "val")


def test_documents_by_url_are_those_of_the_local_files(folder, records):
    records("texts/r.jsonl", 30)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/texts", recursive=True)
    there = TextFiles(["memory://texts"])
    assert [texts(there, split) for split in ("train", "val")] == [
        texts(TextFiles([str(folder)]), split) for split in ("train", "val")
    ]
    assert there.identity() == TextFiles(["memory://texts"]).identity()
    memory.rm("/texts", recursive=True)


def test_a_config_holds_absolute_paths_and_urls_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    held = {"paths": ["texts", "s3://bucket/a.jsonl"], "val_paths": None, "cache_dir": "cache", "seed": 1}
    TextFiles().pin(held)
    assert held == {
        "paths": [f"{tmp_path}/texts", "s3://bucket/a.jsonl"],
        "val_paths": None,
        "cache_dir": f"{tmp_path}/cache",
        "seed": 1,
    }
