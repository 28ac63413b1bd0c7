"""Records: the texts in files of JSON lines and Parquet, and which of many records are for validation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dlm_lightning.data.files import File, suffix

JSON_LINES, PARQUET = (".jsonl", ".json"), (".parquet",)


def of_records(file: File) -> bool:
    """Whether a file holds records, rather than being one text."""
    return suffix(file.name) in JSON_LINES + PARQUET


def texts(file: File, key: str) -> Iterator[str]:
    """The text of each record, in order; raises ValueError with the line or row of one that is malformed."""
    read = _parquet if suffix(file.name) in PARQUET else _json_lines
    return (text_of(record, key, where) for where, record in read(file, key))


def text_of(record: Any, key: str, where: str) -> str:
    """A record's text; raises ValueError, saying where it stands, if it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a record with keys")
    if key not in record:
        raise ValueError(f"{where} has no {key}, which data.text_key asks for; it has {', '.join(record) or 'nothing'}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key} (data.text_key) is not a string, but {type(record[key]).__name__}")
    return record[key]


def for_validation(number: int, share: float, phase: float = 0.0) -> bool:
    """Whether the record of this number, from 0, is one of the evenly spread share that is kept for validation.

    `phase` in [0, 1) shifts the choice, so that of many small files not all keep none.
    """
    return math.floor((number + 1) * share + phase) > math.floor(number * share + phase)


def _json_lines(file: File, key: str) -> Iterator[tuple[str, Any]]:
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file.url} line {number} is not JSON: {error}") from error
                yield f"{file.url} line {number}", record


def _parquet(file: File, key: str) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as content:
        try:
            table = pq.ParquetFile(content)
        except pa.ArrowException as error:
            raise ValueError(f"{file.url} is not a Parquet file: {error}") from error
        names = table.schema_arrow.names
        if key not in names:
            text_of(dict.fromkeys(names), key, file.url)
        rows = (row for batch in table.iter_batches(columns=[key]) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{file.url} row {number}", row
