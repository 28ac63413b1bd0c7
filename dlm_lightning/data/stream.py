"""The stream: which sample comes when, on which rank, with which noise; a pure function of the step, so it resumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from dlm_lightning.data.rows import Row, blank
from dlm_lightning.noise import raw, uniforms
from dlm_lightning.view import Batch

TRAIN, VALIDATION, ORDER, TURNS = 0, 1, 2, 3  # noise streams


class Draw(NamedTuple):
    """A sample: its epoch, its place in that epoch's order, and its row in the data set; -1, -1 is a row of padding."""

    epoch: int
    place: int
    index: int  # type: ignore[assignment]  # a tuple has a method of this name, which nobody calls on a draw


class Sample(NamedTuple):
    """A sample of an optimizer step: where it was computed, and which one it is; see `Draw`."""

    micro_batch: int
    rank: int
    epoch: int
    place: int
    row: int


class Order:
    """The samples of a run, one after another: each epoch is a permutation of the rows, and another one.

    `part` tells the parts of a mixture apart, whose epochs are permuted independently.
    """

    def __init__(self, rows: int, seed: int, part: int = 0) -> None:
        self.rows, self.seed, self.part = rows, seed, part
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def draw(self, n: int) -> Draw:
        """The n-th sample of the run."""
        epoch, place = divmod(n, self.rows)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, _permutation(self.seed, ORDER, epoch, self.part, count=self.rows))
        return Draw(epoch, place, int(self._epoch[1][place]))


class MixedOrder:
    """Several data sets, one after another in the rows, drawn in proportion to weights.

    An epoch has as many samples as there are rows, of which `draws` says how many are each part's; which are whose is
    permuted from epoch to epoch. A part's draws go through epochs of its own, so that each of its rows comes once
    before any comes twice. Without weights they are the rows, so each row comes once per epoch of the mixture.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.rows, self.seed = sum(rows), seed
        self.draws = share_out(self.rows, rows if weights is None else weights)
        self._parts = [Order(count, seed, part) for part, count in enumerate(rows)]
        self._first = np.cumsum([0, *rows])
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, int), np.empty(0, int))

    def draw(self, n: int) -> Draw:
        """The n-th sample of the run."""
        epoch, place = divmod(n, self.rows)
        if self._epoch[0] != epoch:
            places = _permutation(self.seed, TURNS, epoch, count=self.rows)
            part_of, turn_of = np.empty(self.rows, int), np.empty(self.rows, int)
            part_of[places] = np.repeat(np.arange(len(self.draws)), self.draws)
            turn_of[np.argsort(part_of, kind="stable")] = np.concatenate([np.arange(count) for count in self.draws])
            self._epoch = (epoch, part_of, turn_of)
        part, turn = (int(column[place]) for column in self._epoch[1:])
        row = self._parts[part].draw(epoch * self.draws[part] + turn).index
        return Draw(epoch, place, int(self._first[part]) + row)


def share_out(count: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights, by largest remainder (ties to the first), that sum up to `count`."""
    exact = [Fraction(weight) * count / sum(map(Fraction, weights)) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: shares[part] - exact[part])
    for part in by_remainder[: count - sum(shares)]:
        shares[part] += 1
    return shares


def _permutation(seed: int, stream: int, *counter: int, count: int) -> np.ndarray:
    return np.argsort(raw(seed, stream, *counter, count=count), kind="stable")


class TrainStream:
    """Batch sampler over the whole run: micro-batches of this rank from `start` to `stop`.

    The global order is by step, micro-batch, rank and sample, so an optimizer step sees the same samples however they
    are shared out. It resumes by starting later; its length is that of the whole run, because Lightning restores the
    batch index and would otherwise end early.
    """

    def __init__(
        self, order: Order | MixedOrder, batch_size: int, rank: int, ranks: int, start: int, stop: int
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.rank, self.ranks, self.start, self.stop = rank, ranks, start, stop

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[list[Draw]]:
        for micro_batch in range(self.start, self.stop):
            yield self.draws(micro_batch, self.rank)

    def draws(self, micro_batch: int, rank: int) -> list[Draw]:
        """The samples of a rank's micro-batch, which is counted from the beginning of the run."""
        first = (micro_batch * self.ranks + rank) * self.batch_size
        return [self.order.draw(n) for n in range(first, first + self.batch_size)]


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
