"""Data sets of the Hugging Face hub, or of anything else that `datasets` loads."""

from __future__ import annotations

from typing import Any

import datasets


def load(key: str, path: str, name: str | None, split: str, **options: Any) -> Any:
    """A split of a data set; a ValueError, naming the `key`, says why it cannot be had."""
    try:
        return datasets.load_dataset(path, name, split=split, **options)
    except Exception as error:  # of the hub, the network, a file's format …
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise ValueError(f"{key}: {path}, split {split}, cannot be loaded: {reason}") from error
