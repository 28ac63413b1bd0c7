"""Packing: documents laid into rows of equal length, each token with its position and its document."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

FEW = 16  # tokens of a text that are enough to be continued


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


@dataclass
class Tally:
    """What packing has seen: documents by their length in tokens, tokens laid into rows, documents that were cut, or
    left out because nothing of them could be scored, and those that were longer than the model has positions."""

    lengths: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    longer: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.lengths + other.lengths,
            self.tokens + other.tokens,
            self.truncated + other.truncated,
            self.dropped + other.dropped,
            self.longer + other.longer,
        )

    def write(self, path: Path) -> None:
        """As JSON; all or nothing."""
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps({**vars(self), "lengths": sorted(self.lengths.items())}))
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Tally:
        """Raises FileNotFoundError if there is none."""
        content = json.loads(path.read_text())
        return cls(**{**content, "lengths": Counter(dict(content["lengths"]))})


def blank(length: int, pad_id: int) -> Row:
    """A row of padding: nothing maskable, each token a negative document of its own."""
    return Row(
        np.full(length, pad_id, np.int32),
        np.zeros(length, np.int32),
        -1 - np.arange(length, dtype=np.int32),
        np.zeros(length, bool),
    )


def beginning(row: Row, longest: int) -> list[int]:
    """Token ids that precede the first one that may be masked, of the row's first document with one; if that is all but
    its very first token, its first few, at most half. They are cut at their beginning to the `longest` allowed.
    """
    here = row.document == row.document[row.maskable.argmax()]
    ids, shown = row.ids[here], int(row.maskable[here].argmax())
    length = shown if shown > 1 else min(FEW, len(ids) // 2)
    return ids[:length][-longest:].tolist()


def pack(
    documents: Iterable[Document],
    length: int,
    pad_id: int,
    split: bool,
    together: bool = True,
    positions: int = sys.maxsize,
    tally: Tally | None = None,
) -> Iterator[Row]:
    """Rows of `length` tokens holding all documents in order, padded where nothing more fits; fills in the tally.

    With `split`, a document that does not fit goes on in the next row with its positions counting on, and after as many
    tokens as the model has `positions` as a new document; without, it starts a new row, what is longer than a row or
    the positions is cut, and what then has nothing maskable is left out. Unless `together`, each document starts a new
    row.
    """
    row, filled, count = blank(length, pad_id), 0, 0
    tally = Tally() if tally is None else tally
    for ids, maskable in documents:
        done = 0
        stop = len(ids) if split else min(len(ids), length, positions)
        tally.lengths[len(ids)] += 1
        tally.longer += len(ids) > positions
        if not split and not any(maskable[1:stop]):
            tally.dropped += 1
            continue
        tally.truncated += stop < len(ids)
        tally.tokens += stop
        while done < stop:
            position = done % positions
            starts_row = position == 0 and filled > 0 and (not together or (not split and filled + stop > length))
            if filled == length or starts_row:
                yield row
                row, filled, count = blank(length, pad_id), 0, 0
            take = min(stop - done, length - filled, positions - position)
            here = slice(filled, filled + take)
            row.ids[here] = ids[done : done + take]
            row.position[here] = np.arange(position, position + take)
            row.document[here] = count
            row.maskable[here] = maskable[done : done + take]
            row.maskable[filled] = False  # its predecessor is not in the row
            done, filled, count = done + take, filled + take, count + 1
    if filled:
        yield row
