"""Text files and files of records: one's own, local or by URL, or by default the Python standard library's source."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dlm_lightning.data.files import File, train_and_val, versions
from dlm_lightning.data.records import check_share, for_validation, of_records, texts
from dlm_lightning.data.token_data import Span, Split, TokenData

TESTS = {"test", "tests", "idle_test"}
GENERATED = {"encodings", "pydoc_data"}  # tables that are alike across files, and one file as long as all of a split
NOT_LIBRARY = {*TESTS, *GENERATED, "site-packages", "dist-packages", "__pycache__"}


class TextFiles(TokenData):
    """Text files, split by file, or a single one by place, and records of .jsonl and .parquet files, split by record.

    Args:
        paths: files, folders, globs or URLs (`s3://`, `gs://`, `https://`, …); null takes the Python standard library's
            own source, without its tests and generated tables.
        val_paths: the same, for validation; what they name is not trained on, and everything else of `paths` is.
        suffixes: which files of a folder are read; a suffix of compression, such as .gz, may follow.
        text_key: the column of a record that holds its text.
        val_share: without `val_paths`, the share that is kept for validation: of text files by a hash of their names,
            of a single one its end, of each file's records evenly spread.
        **options: see `TokenData`.
    """

    def __init__(
        self,
        paths: list[str] | None = None,
        val_paths: list[str] | None = None,
        suffixes: tuple[str, ...] = (".py", ".md", ".txt", ".jsonl", ".parquet"),
        text_key: str = "text",
        val_share: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_share(val_share)
        if not suffixes or not all(suffix[:1] in ("", ".") for suffix in suffixes):
            raise ValueError(f"data.suffixes must be suffixes with their dot, such as .txt, not {list(suffixes)}")
        self.paths, self.val_paths, self.suffixes = paths, val_paths, suffixes
        self.text_key, self.val_share = text_key, val_share

    @cached_property
    def files(self) -> tuple[list[File], list[File]]:
        """The files of `paths` and of `val_paths`, sorted by their names below the folder that holds them all.

        Raises FileNotFoundError for a path that matches nothing, and ValueError if there is none to train on.
        """
        files, val = train_and_val(_library() if self.paths is None else self.paths, self.val_paths, self.suffixes)
        if not files:
            raise ValueError("data.paths: no file is named to train on; data.val_paths names those to validate on")
        return files, val

    def texts(self, split: Split) -> Iterator[list[Span]]:
        """The documents of a split that are not empty, files in the order of a hash of their names."""
        for file in self._split()[split]:
            for text in self._texts(file, split):
                if text:
                    yield [Span(text)]

    def identity(self) -> str:
        """Names and versions of the files, and what decides which of their documents are in which split."""
        split = str(self.val_share) if self.val_paths is None else "apart"
        return "\n".join([split, self.text_key, *versions(*self.files)])

    def _split(self) -> dict[Split, list[File]]:
        """Files by split: those text files with the smallest hashes are kept for validation, at least one in each."""
        files, val = (sorted(files, key=_hash) for files in self.files)
        if self.val_paths is not None:
            return {"val": val, "train": files}
        if len(files) == 1:
            return {"val": files, "train": files}
        records = [file for file in files if of_records(file)]
        whole = [file for file in files if not of_records(file)]
        kept = max(0, min(max(1, round(len(whole) * self.val_share)), len(whole) - 1))
        return {"val": whole[:kept] + records, "train": whole[kept:] + records}

    def _texts(self, file: File, split: Split) -> Iterator[str]:
        """A file's texts of a split."""
        if of_records(file):
            yield from self._records(file, split)
        elif self.val_paths is None and len(self.files[0]) == 1:
            text = _whole(file)
            start = self._val_start(file, text)
            yield text[:start] if split == "train" else text[start:]
        else:
            yield _whole(file)

    def _val_start(self, file: File, text: str) -> int:
        """Where the end of a single text begins: at the start of a line, at its share of the text or before that."""
        first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1
        wanted = min(round(len(text) * (1 - self.val_share)), last)
        line_break = max(text.rfind("\n", first, wanted), text.find("\n", first, last))
        if line_break < 0:
            raise ValueError(
                f"data.paths: {file.url} has fewer than two lines of text, so none can be kept for validation; "
                "data.val_paths can name what to validate on"
            )
        return line_break + 1

    def _records(self, file: File, split: Split) -> Iterator[str]:
        """A file's records of a split."""
        phase = int.from_bytes(_hash(file)[:4]) / 2**32
        for number, text in enumerate(texts(file, self.text_key)):
            if self.val_paths is not None or for_validation(number, self.val_share, phase) == (split == "val"):
                yield text


def _hash(file: File) -> bytes:
    return hashlib.sha256(file.name.encode()).digest()


def _whole(file: File) -> str:
    with file.open() as content:
        return content.read()


def _library() -> Sequence[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [str(file) for file in root.rglob("*.py") if not NOT_LIBRARY & set(file.relative_to(root).parts)]
