"""The manifest completes a checkpoint: what it is, and its files by size and SHA-256. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"
Files = dict[str, dict[str, Any]]  # by path within the folder: `bytes` and `sha256`


def describe(folder: Path, part: int = 0, parts: int = 1) -> Files:
    """Flush a folder's files to disk and return their sizes and hashes; of several processes, each takes its part."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _measure(path, flush=True) for path in found[part::parts]}


def write(folder: Path, files: Files, **facts: Any) -> None:
    """Complete a folder by the manifest of its files, and flush that to disk as well."""
    content = {**facts, "files": files}
    with (folder / NAME).open("w") as file:
        json.dump({**content, "digest": _digest(content)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    for path in {folder, *(folder / name for name in files)}:
        flush(path if path.is_dir() else path.parent)


def read(folder: Path) -> dict[str, Any]:
    """A folder's manifest, as far as it is whole; ValueError, naming the file, if it is missing or damaged."""
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
        whole = digest == _digest(content) and all(isinstance(item, dict) for item in content["files"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged")
    return content


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are what it says; ValueError, naming the file, for one that is not."""
    content = read(folder)
    for name, stated in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != stated["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} of {stated['bytes']} bytes")
        if _measure(path) != stated:
            raise ValueError(f"{path} is damaged")
    return content


def flush(folder: Path) -> None:
    """Flush the names in a folder to disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path, flush: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
