"""The stream: which sample comes when, on which rank, with which noise; a pure function of the step, so it resumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from dlm_lightning.data.rows import Row, blank
from dlm_lightning.noise import raw, uniforms
from dlm_lightning.view import Batch

TRAIN, VALIDATION, ORDER = 0, 1, 2  # noise streams


class Draw(NamedTuple):
    """A sample: its epoch, its place in that epoch's order, and its row in the data set; -1, -1 is a row of padding."""

    epoch: int
    place: int
    index: int  # type: ignore[assignment]  # a tuple has a method of this name, which nobody calls on a draw


class TrainStream:
    """Batch sampler over the whole run: micro-batches of this rank from `start` to `stop`.

    The global order is by step, micro-batch, rank and sample, so an optimizer step sees the same samples however they
    are shared out. It resumes by starting later; its length is that of the whole run, because Lightning restores the
    batch index and would otherwise end early.
    """

    def __init__(self, rows: int, seed: int, batch_size: int, rank: int, ranks: int, start: int, stop: int) -> None:
        self.rows, self.seed, self.batch_size = rows, seed, batch_size
        self.rank, self.ranks, self.start, self.stop = rank, ranks, start, stop
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[list[Draw]]:
        for micro_batch in range(self.start, self.stop):
            first = (micro_batch * self.ranks + self.rank) * self.batch_size
            yield [self.draw(n) for n in range(first, first + self.batch_size)]

    def draw(self, n: int) -> Draw:
        """The n-th sample of the run."""
        epoch, place = divmod(n, self.rows)
        if self._order[0] != epoch:
            self._order = (epoch, np.argsort(raw(self.seed, ORDER, epoch, count=self.rows), kind="stable"))
        return Draw(epoch, place, int(self._order[1][place]))


class ValidationStream:
    """Batch sampler over `take` of `rows` rows, evenly spread, shared out among ranks in equally many batches.

    Each row comes once. What does not divide is filled with rows of padding: ranks that run different numbers of
    batches would hang.
    """

    def __init__(self, rows: int, take: int, batch_size: int, rank: int, ranks: int) -> None:
        self.rows, self.take, self.batch_size, self.rank, self.ranks = rows, take, batch_size, rank, ranks

    def __len__(self) -> int:
        return -(-self.take // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in range(len(self)):
            first = (batch * self.ranks + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            yield [Draw(0, p, p * self.rows // self.take) if p < self.take else Draw(0, -1, -1) for p in places]


class NoisyRows(torch.utils.data.Dataset):
    """Rows of a data set, indexed by `Draw`, each with its uniforms."""

    def __init__(self, rows: Dataset, length: int, pad_id: int, seed: int, stream: int) -> None:
        self.rows, self.length, self.pad_id = rows, length, pad_id
        self.seed, self.stream = seed, stream

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        row = blank(self.length, self.pad_id) if draw.index < 0 else Row(**self.rows[draw.index])
        u_L, t_L = uniforms(self.seed, self.stream, max(draw.place, 0), draw.epoch, 0, self.length)
        return *row, u_L, t_L, draw.place


def collate(samples: list[tuple[Any, ...]]) -> Batch:
    """Samples of `NoisyRows` as one batch."""
    ids, position, document, maskable, u, t, place = zip(*samples, strict=True)
    integers = [torch.from_numpy(np.stack(column)).long() for column in (ids, position, document)]
    masks = torch.from_numpy(np.stack(maskable)).bool()
    ids_BL, position_BL, document_BL = integers
    return Batch(ids_BL, position_BL, document_BL, masks, torch.stack(u), torch.stack(t), torch.tensor(place))
