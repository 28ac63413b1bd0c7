"""Text of the Hugging Face hub, or of anything else that `datasets` loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS

from dlm_lightning.data.files import absolute
from dlm_lightning.data.hub import load
from dlm_lightning.data.records import check_share, for_validation, placed, text_of
from dlm_lightning.data.token_data import Span, Split, TokenData


class HubText(TokenData):
    """A text data set of the Hugging Face hub, or of local files, by `datasets.load_dataset`.

    Args:
        path: a data set's name on the hub, a local folder, or a format such as `json` with `data_files`.
        name: which of the data set's configurations.
        split: the split to train on; `datasets`' slices such as `train[:10%]` are allowed unless streaming.
        val_split: the split to validate on; null keeps `val_share` of the documents of `split`, evenly spread.
        text_key: the column that holds the text.
        data_files: which files of the data set, by paths, globs or URLs; null takes what its own description says.
        revision: a branch, tag or commit on the hub; null takes the newest.
        streaming: read documents as they are needed, instead of downloading all first.
        documents: how many documents of each split to read; null reads all, which streaming refuses.
        val_share: the share of documents that is kept for validation.
        **options: see `TokenData`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        text_key: str = "text",
        data_files: list[str] | str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        documents: int | None = None,
        val_share: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_share(val_share)
        if documents is not None and documents < 1:
            raise ValueError(f"data.documents must be at least 1, not {documents}")
        if streaming and documents is None:
            raise ValueError(
                "data.documents must say how many to read with data.streaming, since a run must have an end"
            )
        self.path, self.name, self.split, self.val_split, self.text_key = path, name, split, val_split, text_key
        self.data_files, self.revision, self.streaming = data_files, revision, streaming
        self.documents, self.val_share = documents, val_share

    def texts(self, split: Split) -> Iterator[list[Span]]:
        """The documents of a split that are not empty."""
        whole = self._loaded["val" if split == "val" and self.val_split else "train"]
        for number, (place, record) in enumerate(placed(self.path, islice(self._read(whole), self.documents))):
            here = self.val_split is not None or for_validation(number, self.val_share) == (split == "val")
            if here and (text := text_of(place, record, self.text_key)):
                yield [Span(text)]

    def identity(self) -> str:
        """What `datasets` calls the documents, or, streaming, the keys that say which they are."""
        splits = self.split, self.val_split or self.val_share, self.text_key, self.documents
        if self.streaming:
            path = absolute(self.path) if os.path.exists(self.path) else self.path
            return f"{path} {self.name} {self.data_files} {self.revision} {splits}"
        return " ".join([*(data._fingerprint for data in self._loaded.values()), str(splits)])

    def pin(self, init_args: Any) -> None:
        """Those of all modules; a local data set's folder; data files where they are relative to where `dlm` runs."""
        super().pin(init_args)
        if os.path.isdir(self.path):
            init_args["path"] = absolute(self.path)
        elif self.path in BUILDERS and self.data_files:
            files = [self.data_files] if isinstance(self.data_files, str) else self.data_files
            init_args["data_files"] = [absolute(file) for file in files]

    @cached_property
    def _loaded(self) -> dict[Split, Any]:
        loaded: dict[Split, Any] = {"train": self._load(self.split)}
        return loaded | ({"val": self._load(self.val_split)} if self.val_split else {})

    def _load(self, split: str) -> Any:
        options = {"data_files": self.data_files, "revision": self.revision, "streaming": self.streaming}
        return load("data.path", self.path, self.name, split, **options)

    def _read(self, data: Any) -> Iterator[Any]:
        """The records of a split, without columns that nobody asks for."""
        columns = data.column_names or []  # of a stream not always known
        return iter(data.select_columns([self.text_key]) if self.text_key in columns else data)
