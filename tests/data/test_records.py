"""Records of JSON lines and Parquet: their texts, where one is malformed, and which are for validation."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_lightning.data.files import find
from dlm_lightning.data.records import for_validation, of_records, read, texts

RECORDS = [{"id": n, "text": f"text {n}\nof two lines \u2028 or so"} for n in range(5)]


def write(path, records):
    if path.suffix == ".parquet":
        columns = {key: [record.get(key) for record in records] for key in records[0]}
        pq.write_table(pa.table(columns), path, row_group_size=2)
    else:
        lines = "\n\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    [file] = find("data.paths", [str(path)], ())
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_each_record_is_a_text(tmp_path, name):
    file = write(tmp_path / name, RECORDS)
    assert of_records(file)
    assert list(texts(file, "text")) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.txt.gz", "jsonl"])
def test_other_files_hold_no_records(tmp_path, name):
    assert not of_records(write(tmp_path / name, ["{}"]))


@pytest.mark.parametrize(
    ("name", "records", "says"),
    [
        ("a.jsonl", [{"text": "a"}, "{broken"], "a.jsonl:3 is not JSON: Expecting property name"),
        ("a.jsonl", [{"text": "a"}, "[1]"], "a.jsonl:3 is a list, not an object"),
        (
            "a.jsonl",
            [{"text": "a"}, {"body": 1, "id": 2}],
            "a.jsonl:3 has no text, which data.text_key asks for; it has body, id",
        ),
        (
            "a.json.gz",
            [{"text": "a"}, {"text": None}],
            r"a.json.gz:3 has a text \(data.text_key\) that is null, not text",
        ),
        ("a.jsonl", ['{"text": "\\ud83d"}'], "a.jsonl:1 has a text .* that is not Unicode: surrogates not allowed"),
        (
            "a.parquet",
            [{"body": "a", "id": 2}],
            "a.parquet:1 has no text, which data.text_key asks for; it has body, id",
        ),
        ("a.parquet", [{"text": 1}], "a.parquet:1 has a text .* that is a number, not text"),
        ("a.parquet", [{"text": "a"}, {"text": None}], "a.parquet:2 has a text .* that is null, not text"),
    ],
)
def test_a_malformed_record_is_named_with_its_place(tmp_path, name, records, says):
    file = write(tmp_path / name, records)
    with pytest.raises(ValueError, match=says):
        list(texts(file, "text"))


LINES = b'{"n": 1}\r\n\n  \n{"n": 2}\n"\xff\xe2\x80\xa8"'


def test_lines_are_bytes_with_the_numbers_that_an_editor_shows(tmp_path):
    for name, content in (("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES)), ("notes", LINES)):
        (tmp_path / name).write_bytes(content)
        [file] = find("data.paths", [str(tmp_path / name)], ())
        assert list(read(file, [])) == [
            (f"{tmp_path / name}:1", b'{"n": 1}'),
            (f"{tmp_path / name}:4", b'{"n": 2}'),
            (f"{tmp_path / name}:5", b'"\xff\xe2\x80\xa8"'),
        ]


def test_only_those_columns_are_read_that_are_asked_for_where_there_are_any(tmp_path):
    file = write(tmp_path / "a.parquet", [{"a": 1, "b": [2], "c": 3}, {"a": 4, "b": [], "c": 6}])
    asked = [(f"{file.url}:1", {"b": [2]}), (f"{file.url}:2", {"b": []})]
    assert list(read(file, ["b", "other"])) == asked
    assert [record for _, record in read(file, ["other"])] == [{"a": 1, "b": [2], "c": 3}, {"a": 4, "b": [], "c": 6}]


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}')
    [file] = find("data.paths", [str(tmp_path / "a.jsonl")], ())
    with pytest.raises(ValueError, match=r"a.jsonl:2 is not JSON: .* can't decode byte"):
        list(texts(file, "text"))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("not a table")
    [file] = find("data.paths", [str(tmp_path / "a.parquet")], ())
    with pytest.raises(ValueError, match=r"a.parquet cannot be read: Parquet magic bytes not found"):
        list(texts(file, "text"))


def test_a_parquet_file_that_is_damaged_in_its_middle_is_named(tmp_path):
    file = write(tmp_path / "a.parquet", [{"text": f"{n} " * 99} for n in range(99)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[999:2999] = b"\xff" * 2000
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet cannot be read: "):
        list(texts(file, "text"))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_told_from_json_lines(tmp_path, indent):
    (tmp_path / "a.json").write_text("\n" + json.dumps(RECORDS, indent=indent))
    [file] = find("data.paths", [str(tmp_path / "a.json")], ())
    with pytest.raises(ValueError, match=r"a.json holds a JSON array; expected are JSON lines, each a record$"):
        list(texts(file, "text"))


@given(st.integers(1, 500), st.floats(0.01, 0.99), st.floats(0, 1, exclude_max=True))
def test_the_share_is_kept_evenly_from_any_place_on(count, share, phase):
    kept = [for_validation(number, share, phase) for number in range(500)]
    for start in (0, 137):
        window = kept[start : start + count]
        assert abs(sum(window) - share * len(window)) < 1 + 1e-6


@given(st.floats(1e-9, 1, exclude_max=True))
def test_a_phase_keeps_the_first(share):
    assert for_validation(0, share, phase=1 - share)


def test_by_hand():
    assert [n for n in range(20) if for_validation(n, 0.25)] == [3, 7, 11, 15, 19]
    assert [n for n in range(20) if for_validation(n, 0.25, phase=0.5)] == [1, 5, 9, 13, 17]
