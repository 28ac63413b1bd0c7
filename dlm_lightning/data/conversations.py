"""Conversations as they lie in files or on the hub: records with their places, read as lists of messages."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import fsspec
import pyarrow.parquet

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")  # of a folder's files
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; others are what they say
Message = dict[str, Any]


class Malformed(ValueError):
    """Why a record is no conversation, to be read after its place."""


def files(paths: Sequence[str], key: str) -> list[str]:
    """The files of paths, folders, globs and fsspec URLs, sorted and each once.

    Raises FileNotFoundError, naming `data.<key>`, for a path that matches nothing.
    """
    found = set()
    for path in paths:
        system, place = fsspec.url_to_fs(path)
        if system.isdir(place):
            names = [name for name in system.find(place) if name.endswith(SUFFIXES)]
        else:
            names = [place] if system.exists(place) else system.glob(place)
        if not names:
            raise FileNotFoundError(f"data.{key}: nothing matches {path}")
        local = "file" in system.protocol
        found |= {os.path.normpath(name) if local else system.unstrip_protocol(name) for name in names}
    return sorted(found)


def digest(file: str) -> str:
    """A hash of a file's bytes."""
    with fsspec.open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def records(file: str) -> Iterator[tuple[str, Any]]:
    """(`file:line`, record) of each line of a JSONL that is not blank, as bytes, or of each row of a parquet file."""
    with fsspec.open(file, "rb", compression="infer") as stream:
        if file.endswith(".parquet"):
            batches = pyarrow.parquet.ParquetFile(stream).iter_batches()
            found: Iterator[Any] = (row for batch in batches for row in batch.to_pylist())
        else:
            found = (line.strip() for line in stream)
        yield from ((f"{file}:{number}", record) for number, record in enumerate(found, start=1) if record)


def hub_set(hub: str, name: str | None, split: str) -> datasets.Dataset:
    """A split of a data set of the hub, or of a local folder; a ValueError says why it cannot be had."""
    try:
        return datasets.load_dataset(hub, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.hub: {hub} cannot be loaded: {error}") from error


def messages(record: Any, prompt_key: str, response_key: str) -> list[Message]:
    """The messages of a record: `messages`, ShareGPT's `conversations`, or else a prompt and its response.

    Each is a dict with at least `role` and `content`. Raises Malformed for everything else.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise Malformed(f"is {_kind(record)}, not an object")
    key = next((key for key in ("messages", "conversations") if record.get(key) is not None), None)
    if key is None:
        pair = [record.get(prompt_key), record.get(response_key)]
        if None in pair:
            raise Malformed(f"has neither messages nor conversations nor {prompt_key} and {response_key}")
        turns: Any = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    else:
        turns = record[key]
    if not isinstance(turns, list):
        raise Malformed(f"has {key} that are {_kind(turns)}, not a list")
    if not turns:
        raise Malformed(f"has {key} that are empty")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> Message:
    if isinstance(turn, dict) and "role" not in turn and "from" in turn:
        turn = {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise Malformed(f"has a message {number} without role and content")
    for key in ("role", "content"):
        if not isinstance(turn[key], str):
            raise Malformed(f"has a message {number} whose {key} is {_kind(turn[key])}, not text")
        try:
            turn[key].encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and no tokenizer reads
            raise Malformed(f"has a message {number} whose {key} is not Unicode: {error.reason}") from error
    return turn


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
