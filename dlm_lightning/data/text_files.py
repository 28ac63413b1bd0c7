"""Text files: one's own folders and globs, or by default the Python standard library's source."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from dlm_lightning.data.token_data import Span, Split, TokenData

TESTS = {"test", "tests", "idle_test"}
GENERATED = {"encodings", "pydoc_data"}  # tables that are alike across files, and one file as long as all of a split
NOT_LIBRARY = {*TESTS, *GENERATED, "site-packages", "dist-packages", "__pycache__"}


class TextFiles(TokenData):
    """Text files as documents, split by file.

    Args:
        paths: files, folders or globs; null takes the Python standard library's own source, without its tests and
            generated tables.
        suffixes: which files of a folder are read.
        val_share: the share of files, chosen by a hash of their names, that is kept for validation.
        **options: see `TokenData`.
    """

    def __init__(
        self,
        paths: list[str] | None = None,
        suffixes: tuple[str, ...] = (".py", ".md", ".txt"),
        val_share: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < val_share < 1:
            raise ValueError(f"data.val_share must lie between 0 and 1, not {val_share}")
        self.paths, self.suffixes, self.val_share = paths, suffixes, val_share

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of each file, sorted; a name is a path below the folder that holds all files.

        Raises FileNotFoundError for a path that matches nothing, and ValueError if there are not two files to split.
        """
        found = _library() if self.paths is None else {file for path in self.paths for file in self._matching(path)}
        if len(found) < 2:
            raise ValueError(
                f"data.paths: {', '.join(self.paths or [])} must hold at least two {' '.join(self.suffixes)} files, "
                f"one to train on and one for validation, not {len(found)}"
            )
        root = os.path.commonpath([file.parent for file in found])
        return sorted((file.relative_to(root).as_posix(), file) for file in found)

    def _matching(self, path: str) -> Iterator[Path]:
        """The absolute paths of a file, of a folder's files, or of what a glob matches."""
        place = Path(path).expanduser().absolute()
        matches = [place] if place.exists() else [Path(match) for match in glob.glob(str(place), recursive=True)]
        if not matches:
            raise FileNotFoundError(f"data.paths: nothing matches {path}")
        for match in matches:
            inside = (file for file in match.rglob("*") if file.suffix in self.suffixes and file.is_file())
            yield from (Path(os.path.normpath(file)) for file in (inside if match.is_dir() else [match]))

    def texts(self, split: Split) -> Iterator[list[Span]]:
        """The files of a split that are not empty, in the order of a hash of their names."""
        for _, path in self._split()[split]:
            if text := path.read_text(encoding="utf-8", errors="replace"):
                yield [Span(text)]

    def identity(self) -> str:
        """Names, sizes and times of the files, and the share that is kept for validation."""
        stats = [(name, path.stat()) for name, path in self.files]
        return "\n".join([str(self.val_share), *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)])

    def _split(self) -> dict[Split, list[tuple[str, Path]]]:
        """Files by split: those with the smallest hashes are kept for validation, at least one in each."""
        files = sorted(self.files, key=lambda file: hashlib.sha256(file[0].encode()).digest())
        kept = min(max(1, round(len(files) * self.val_share)), len(files) - 1)
        return {"val": files[:kept], "train": files[kept:]}


def _library() -> set[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return {file for file in root.rglob("*.py") if not NOT_LIBRARY & set(file.relative_to(root).parts)}
