"""Packing: documents laid into rows of equal length, each token with its position and its document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """Token ids, and for each whether it may be masked and scored; the others are shown only."""

    ids: Sequence[int]
    maskable: Sequence[bool]


class Row(NamedTuple):
    """One packed row; see `dlm_lightning.view.Batch` for the meaning of the columns."""

    ids: np.ndarray
    position: np.ndarray
    document: np.ndarray
    maskable: np.ndarray


def blank(length: int, pad_id: int) -> Row:
    """A row of padding: nothing maskable, each token a negative document of its own."""
    return Row(
        np.full(length, pad_id, np.int32),
        np.zeros(length, np.int32),
        -1 - np.arange(length, dtype=np.int32),
        np.zeros(length, bool),
    )


def pack(documents: Iterable[Document], length: int, pad_id: int, split: bool) -> Iterator[Row]:
    """Rows of `length` tokens holding all documents in order; only the last row (or, unsplit, row ends) is padded.

    With `split`, a document that does not fit goes on in the next row with its positions counting on; without, it
    starts a new row, and what is longer than a row is cut at its end.
    """
    row, filled, count = blank(length, pad_id), 0, 0
    for ids, maskable in documents:
        done = 0
        stop = len(ids) if split else min(len(ids), length)
        while done < stop:
            if filled == length or (not split and filled + stop > length):
                yield row
                row, filled, count = blank(length, pad_id), 0, 0
            take = min(stop - done, length - filled)
            here = slice(filled, filled + take)
            row.ids[here] = ids[done : done + take]
            row.position[here] = np.arange(done, done + take)
            row.document[here] = count
            row.maskable[here] = maskable[done : done + take]
            row.maskable[filled] = False  # its predecessor is not in the row
            done, filled, count = done + take, filled + take, count + 1
    if filled:
        yield row
