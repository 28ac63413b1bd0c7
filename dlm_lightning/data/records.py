"""Records: what JSON lines and Parquet hold, each with its place, and which of many records are for validation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from dlm_lightning.data.files import File, suffix

JSON_LINES, PARQUET = (".jsonl", ".json"), (".parquet",)


class Malformed(ValueError):
    """Why a record is not what it should be, to be read after its place."""


def of_records(file: File) -> bool:
    """Whether a file holds records, rather than being one text."""
    return suffix(file.name) in JSON_LINES + PARQUET


def read(file: File, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(`file:3`, record) of each row of a Parquet file, or of each line of another that is not blank, as bytes.

    Of a Parquet file only the columns of these keys are read, where it has any. Raises ValueError for a file that is
    not what its suffix says, or one JSON array.
    """
    if suffix(file.name) in PARQUET:
        yield from placed(file.url, _rows(file, keys))
        return
    lines = ((place, line) for place, line in placed(file.url, _lines(file)) if line)
    for number, (place, line) in enumerate(lines):
        if number == 0 and line.startswith(b"["):
            raise ValueError(f"{file.url} holds a JSON array; expected are JSON lines, each a record")
        yield place, line


def _rows(file: File, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    with file.open("rb") as content:
        table = pq.ParquetFile(content)
        columns = [key for key in keys if key in table.schema_arrow.names] or None
        yield from (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())


def _lines(file: File) -> Iterator[bytes]:
    with file.open("rb") as content:
        yield from (line.strip() for line in content)


def placed(name: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each record with its place, counted from 1."""
    return ((f"{name}:{number}", record) for number, record in enumerate(records, 1))


def texts(file: File, key: str) -> Iterator[str]:
    """The text of each record, in order; raises ValueError with the place of one that is malformed."""
    return (text_of(place, record, key) for place, record in read(file, [key]))


def text_of(place: str, record: Any, key: str) -> str:
    """A record's text; raises ValueError, saying where it stands, if it has none."""
    try:
        found = mapping(record)
        if key not in found:
            have = ", ".join(found) or "nothing"
            raise Malformed(f"has no {key}, which data.text_key asks for; it has {have}")
        return text(found[key], f"has a {key} (data.text_key) that")
    except Malformed as error:
        raise ValueError(f"{place} {error}") from error


def mapping(record: Any) -> dict[str, Any]:
    """A record, or a line of JSON that holds one; raises Malformed for everything else."""
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise Malformed(f"is {kind(record)}, not an object")
    return record


def text(value: Any, what: str) -> str:
    """A value that must be text; raises Malformed, which begins with `what`."""
    if not isinstance(value, str):
        raise Malformed(f"{what} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and no tokenizer reads
        raise Malformed(f"{what} is not Unicode: {error.reason}") from error
    return value


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def check_share(val_share: float) -> None:
    """Refuse a share that leaves one of the splits without anything."""
    if not 0 < val_share < 1:
        raise ValueError(f"data.val_share must lie between 0 and 1, not {val_share}")


def for_validation(number: int, share: float, phase: float = 0.0) -> bool:
    """Whether the record of this number, from 0, is one of the evenly spread share that is kept for validation.

    `phase` in [0, 1) shifts the choice, so that of many small files not all keep none; 1 - share keeps the first.
    """
    return math.floor((number + 1) * share + phase) > math.floor(number * share + phase)
