"""Records of JSON lines and Parquet: their texts, where one is malformed, and which are for validation."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_lightning.data.files import find
from dlm_lightning.data.records import for_validation, of_records, texts

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
        ("a.jsonl", [{"text": "a"}, "{broken"], "a.jsonl line 3 is not JSON: Expecting property name"),
        ("a.jsonl", [{"text": "a"}, "[1]"], "a.jsonl line 3 is not a record with keys"),
        ("a.jsonl", [{"text": "a"}, {"body": 1, "id": 2}], "line 3 has no text, which data.text_key asks for; it has"),
        (
            "a.json.gz",
            [{"text": "a"}, {"text": None}],
            "line 3: text .* is not a string, but NoneType",
        ),
        ("a.parquet", [{"body": "a", "id": 2}], "a.parquet has no text, which data.text_key asks for; it has body, id"),
        ("a.parquet", [{"text": 1}], r"a.parquet row 1: text \(data.text_key\) is not a string, but int"),
        ("a.parquet", [{"text": "a"}, {"text": None}], "a.parquet row 2: text .* is not a string, but NoneType"),
    ],
)
def test_a_malformed_record_is_named_with_its_place(tmp_path, name, records, says):
    file = write(tmp_path / name, records)
    with pytest.raises(ValueError, match=says):
        list(texts(file, "text"))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("not a table")
    [file] = find("data.paths", [str(tmp_path / "a.parquet")], ())
    with pytest.raises(ValueError, match=r"a.parquet is not a Parquet file"):
        list(texts(file, "text"))


@given(st.integers(1, 500), st.floats(0.01, 0.99), st.floats(0, 1, exclude_max=True))
def test_the_share_is_kept_evenly_from_any_place_on(count, share, phase):
    kept = [for_validation(number, share, phase) for number in range(500)]
    for start in (0, 137):
        window = kept[start : start + count]
        assert abs(sum(window) - share * len(window)) < 1 + 1e-6


def test_by_hand():
    assert [n for n in range(20) if for_validation(n, 0.25)] == [3, 7, 11, 15, 19]
    assert [n for n in range(20) if for_validation(n, 0.25, phase=0.5)] == [1, 5, 9, 13, 17]
