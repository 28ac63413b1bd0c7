"""What is a conversation, where records come from, and what is said of a record that is none."""

import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from dlm_lightning.data.conversations import Malformed, digest, files, hub_set, messages, records

ASKED = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]


def read(record):
    return messages(record, "prompt", "response")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": ASKED, "prompt": "of another", "conversations": None},
        {"conversations": [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}], "id": 7},
        {"conversations": ASKED},
        {"prompt": "how?", "response": "so"},
    ],
)
def test_every_shape_is_the_same_messages(record):
    assert read(record) == read(json.dumps(record).encode()) == ASKED


def test_the_keys_of_a_prompt_and_its_response_are_free():
    assert messages({"question": "how?", "answer": "so"}, "question", "answer") == ASKED


def test_other_roles_and_what_else_a_message_says_are_kept():
    turns = [{"role": "critic", "content": "", "name": "Ada"}, {"role": "assistant", "content": "so", "thinking": "hm"}]
    assert read({"messages": turns}) == turns
    assert read({"conversations": [{"from": "observation", "value": "3"}]}) == [{"role": "observation", "content": "3"}]


@pytest.mark.parametrize(
    "text", ["", "נִקּוּד عربي", "👩‍👩‍👧‍👦 🏳️‍🌈", "a\u2028b\x85c\r\n\td", "```py\nprint()\n```", "x" * 1_000_000]
)
def test_odd_texts_are_texts(text, tmp_path):
    turns = [{"role": "user", "content": text}, {"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    for ascii_only in (True, False):
        path = tmp_path / "a.jsonl"
        path.write_bytes(json.dumps({"messages": turns}, ensure_ascii=ascii_only).encode() + b"\n")
        [(_, record)] = records(str(path))
        assert read(record) == turns


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{'messages': []}", "is not JSON: Expecting property name"),
        (b'{"messages": [', "is not JSON: Expecting value"),
        (b'\xff{"messages": []}', "is not JSON: .* can't decode byte"),
        (b"[" * 100_000, "is not JSON: maximum recursion"),
        (b"[1, 2]", "is a list, not an object"),
        (b"3", "is a number, not an object"),
        ({}, "has neither messages nor conversations nor prompt and response"),
        ({"prompt": "how?"}, "has neither messages nor"),
        ({"text": "all of it"}, "has neither messages nor"),
        ({"messages": "hello"}, "has messages that are text, not a list"),
        ({"messages": []}, "has messages that are empty"),
        ({"conversations": []}, "has conversations that are empty"),
        ({"messages": ["hello"]}, "has a message 1 without role and content"),
        ({"messages": [*ASKED, {"role": "user"}]}, "has a message 3 without role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "has a message 1 whose content is null, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "whose content is a list, not text"),
        ({"messages": [{"role": "user", "content": 3.5}]}, "whose content is a number, not text"),
        ({"messages": [{"role": True, "content": ""}]}, "has a message 1 whose role is a truth value, not text"),
        ({"conversations": [{"from": "gpt"}]}, "has a message 1 whose content is null, not text"),
        ({"prompt": {"a": 1}, "response": "so"}, "has a message 1 whose content is an object, not text"),
        (b'{"prompt": "\\ud83d", "response": ""}', "has a message 1 whose content is not Unicode: surrogates"),
    ],
)
def test_what_is_no_conversation_says_why(record, reason):
    with pytest.raises(Malformed, match=f"^{reason}|{reason}"):
        read(record)


# Where they come from

LINES = b'{"n": 1}\n\n  \n{"n": 2}\n{"n": 3}'


def test_records_have_the_numbers_of_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    assert list(records(str(path))) == [(f"{path}:{n}", b'{"n": %d}' % m) for n, m in ((1, 1), (4, 2), (5, 3))]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(LINES))
    assert [record for _, record in records(str(packed))] == [record for _, record in records(str(path))]


def test_a_parquet_file_has_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"messages": [ASKED, ASKED[:1]]}), path)
    assert list(records(str(path))) == [(f"{path}:1", {"messages": ASKED}), (f"{path}:2", {"messages": ASKED[:1]})]


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/3.jsonl.gz", "a/4.parquet", "a/notes.txt", "[5].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["."], ["[5].jsonl", "a/1.jsonl", "a/3.jsonl.gz", "a/4.parquet", "b/2.jsonl"]),
        (["b", "a/1.jsonl", "a/../b/2.jsonl"], ["a/1.jsonl", "b/2.jsonl"]),
        (["*/*.jsonl"], ["a/1.jsonl", "b/2.jsonl"]),
        (["**/*.gz", "a/notes.txt"], ["a/3.jsonl.gz", "a/notes.txt"]),
        (["[5].jsonl"], ["[5].jsonl"]),
    ],
)
def test_files_folders_and_globs(folder, paths, found, monkeypatch):
    monkeypatch.chdir(folder)
    assert files(paths, "paths") == files([str(folder / path) for path in paths], "paths")
    assert files(paths, "paths") == [str(folder / name) for name in found]


def test_other_file_systems():
    memory = fsspec.filesystem("memory")
    memory.pipe("/chats/a.jsonl", LINES)
    try:
        for path in ("memory://chats", "memory://chats/*.jsonl", "memory:///chats/a.jsonl"):
            [found] = files([path], "paths")
            assert found == "memory:///chats/a.jsonl"
        assert [record for _, record in records(found)] == [b'{"n": 1}', b'{"n": 2}', b'{"n": 3}']
    finally:
        memory.rm("/chats", recursive=True)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/*.jsonl", "a/*.md", "empty"])
def test_a_path_that_matches_nothing_is_named(folder, missing):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data.val_paths: nothing matches .*" + missing.replace("*", r"\*")):
        files([str(folder / "a"), str(folder / missing)], "val_paths")


def test_a_digest_is_of_what_a_file_holds(folder):
    before = digest(str(folder / "a/1.jsonl"))
    assert before == digest(str(folder / "b/2.jsonl"))
    (folder / "a/1.jsonl").write_bytes(LINES + b"\n")
    assert digest(str(folder / "a/1.jsonl")) != before


def test_a_hub_set_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"messages": ASKED}) + "\n")
    (folder / "test.jsonl").write_text(json.dumps({"messages": ASKED[::-1]}) + "\n")
    assert [read(record) for record in hub_set(str(folder), None, "test")] == [ASKED[::-1]]
    with pytest.raises(ValueError, match=r"^data.hub: .*set cannot be loaded: .*valid"):
        hub_set(str(folder), None, "valid")
    with pytest.raises(ValueError, match=r"^data.hub: nobody/nothing cannot be loaded"):
        hub_set("nobody/nothing", None, "train")
