"""Where documents lie: files, folders and globs, local or by URL, all through fsspec."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

SAMPLE = 1 << 16  # bytes of a local file that are read at its beginning, middle and end to tell its versions apart


class File(NamedTuple):
    """A file: its path below the folder that holds all files it was found with, and where it lies."""

    name: str
    path: str
    system: AbstractFileSystem

    @property
    def url(self) -> str:
        """What to call it in a message: a local path or a URL."""
        return self.path if isinstance(self.system, LocalFileSystem) else self.system.unstrip_protocol(self.path)

    @contextmanager
    def open(self, mode: str = "r") -> Iterator[IO[Any]]:
        """Open it for reading, decompressed; undecodable bytes of a text are replaced.

        Raises ValueError, naming the file, for whatever fails until it is closed.
        """
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace"}
        try:
            with self.system.open(self.path, mode, compression="infer", **text) as content:
                yield content
        except Exception as error:  # each file system, compression and format has its own
            raise ValueError(f"{self.url} cannot be read: {error or type(error).__name__}") from error

    def version(self) -> str:
        """A text that changes with the content: of a local file its size and a hash of its beginning, middle and end
        (of a small one, of all of it), of another what its server says."""
        if not isinstance(self.system, LocalFileSystem):
            return str(self.system.checksum(self.path))
        size, digest = self.system.size(self.path), hashlib.sha256()
        with self.system.open(self.path, "rb") as file:
            for start in sorted({0, max(0, (size - SAMPLE) // 2), max(0, size - SAMPLE)}):
                file.seek(start)
                digest.update(file.read(SAMPLE))
        return f"{size} {digest.hexdigest()}"


def absolute(path: str) -> str:
    """A local path from the root; a URL as it is."""
    return path if "://" in path or "::" in path else os.path.abspath(os.path.expanduser(path))


def suffix(name: str) -> str:
    """The last suffix, not counting one of compression: `.jsonl` of `a.jsonl.gz`."""
    path = PurePosixPath(name)
    return (path.with_suffix("") if infer_compression(name) else path).suffix


def find(key: str, paths: Sequence[str], suffixes: Sequence[str]) -> list[File]:
    """The files of paths, folders (those with the suffixes) and globs, each once, sorted by name.

    Raises FileNotFoundError or ValueError, naming the `key`, for a path without any file, or that cannot be looked up.
    """
    found: dict[str, tuple[str, AbstractFileSystem]] = {}
    for path in paths:
        try:
            system, place = url_to_fs(absolute(path))
            matches = list(_matching(system, place, suffixes))
        except FileNotFoundError as error:
            reason = f": {error.__cause__}" if error.__cause__ else ""
            raise FileNotFoundError(f"{key}: nothing matches {path}{reason}") from error
        except Exception as error:  # each file system has its own, and its own package to be missing
            raise ValueError(f"{key}: {path} cannot be looked up: {error or type(error).__name__}") from error
        if not matches:
            raise FileNotFoundError(f"{key}: {path} holds no file ({' '.join(suffixes)})")
        found |= {system.unstrip_protocol(match): (match, system) for match in matches}
    folders = [url.split("/")[:-1] for url in found]
    depth = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))
    files = [File("/".join(url.split("/")[depth:]), *where) for url, where in found.items()]
    return sorted(files, key=lambda file: (file.name, file.path))


def train_and_val(
    paths: Sequence[str], val_paths: Sequence[str] | None, suffixes: Sequence[str]
) -> tuple[list[File], list[File]]:
    """The files of `data.paths` that are none of `data.val_paths`, and those; see `find`.

    Raises ValueError if none is left of `data.paths`, and for an empty list of `val_paths`.
    """
    if val_paths is not None and not val_paths:
        raise ValueError("data.val_paths must name what to validate on; null keeps a share of data.paths")
    found, val = find("data.paths", paths, suffixes), find("data.val_paths", val_paths or [], suffixes)
    apart = {file.url for file in val}
    train = [file for file in found if file.url not in apart]
    if found and not train:
        raise ValueError("data.val_paths keeps all files of data.paths for validation, so there is none to train on")
    return train, val


def versions(train: Sequence[File], val: Sequence[File]) -> list[str]:
    """Names and versions of files, by the key that they come from."""
    sides = {"paths": train, "val_paths": val}
    return [f"{side} {file.name} {file.version()}" for side, files in sides.items() for file in files]


def _matching(system: AbstractFileSystem, place: str, suffixes: Sequence[str]) -> Iterator[str]:
    """The file, the folder's files, or the files and folders' files of a glob."""
    try:
        matches = {place: system.info(place)}
    except FileNotFoundError:
        matches = system.glob(place, detail=True)
        if not matches:
            raise
    for match, info in matches.items():
        if _is(system, match, info, "directory"):
            inside = system.find(match, detail=True).items()
            yield from (name for name, info in inside if suffix(name) in suffixes and _is(system, name, info, "file"))
        else:
            yield match


def _is(system: AbstractFileSystem, path: str, info: dict[str, Any], kind: str) -> bool:
    if info["type"] in ("file", "directory"):
        return info["type"] == kind
    return system.isdir(path) if kind == "directory" else system.isfile(path)  # a local link, which leads to either
