"""Text files: one's own folders and globs, or by default the Python standard library's source."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from dlm_lightning.data.token_data import Split, TokenData

NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}


class TextFiles(TokenData):
    """Text files as documents, split by file.

    Args:
        paths: files, folders or globs; null takes the Python standard library's own source without its tests.
        suffixes: which files of a folder are read.
        val_share: the share of files, chosen by a hash of their names, that is kept for validation.
        **options: see `TokenData`.
    """

    def __init__(
        self,
        paths: list[str] | None = None,
        suffixes: tuple[str, ...] = (".py", ".md", ".txt"),
        val_share: float = 0.04,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < val_share < 1:
            raise ValueError(f"data.val_share must lie between 0 and 1, not {val_share}")
        self.paths, self.suffixes, self.val_share = paths, suffixes, val_share

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of each file, sorted by name; raises FileNotFoundError for a path that matches nothing."""
        if self.paths is None:
            root = Path(sysconfig.get_path("stdlib"))
            found = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
            return sorted((name, p) for name, p in found.items() if not NOT_LIBRARY & set(p.relative_to(root).parts))
        found = {}
        for path in self.paths:
            matches = [Path(match) for match in glob.glob(str(Path(path).expanduser()), recursive=True)]
            if not matches:
                raise FileNotFoundError(f"data.paths: nothing matches {path}")
            for match in matches:
                if match.is_dir():
                    inside = (p for p in match.rglob("*") if p.suffix in self.suffixes and p.is_file())
                    found |= {p.relative_to(match.parent).as_posix(): p for p in inside}
                else:
                    found[match.name if Path(path) == match else match.as_posix()] = match
        if not found:
            raise FileNotFoundError(f"data.paths: {', '.join(self.paths)} hold no {' '.join(self.suffixes)} file")
        return sorted(found.items())

    def texts(self, split: Split) -> Iterator[tuple[str, str]]:
        """The files of a split, in the order of a hash of their names."""
        for _, path in self._split()[split]:
            yield "", path.read_text(encoding="utf-8", errors="replace")

    def identity(self) -> str:
        """Names, sizes and times of the files, and the share that is kept for validation."""
        stats = [(name, path.stat()) for name, path in self.files]
        return "\n".join([str(self.val_share), *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)])

    def _split(self) -> dict[Split, list[tuple[str, Path]]]:
        """Files by split: those with the smallest hashes are kept for validation, at least one if there are two."""
        files = sorted(self.files, key=lambda file: hashlib.sha256(file[0].encode()).digest())
        kept = min(max(1, round(len(files) * self.val_share)), len(files) - 1)
        return {"val": files[:kept], "train": files[kept:]}
