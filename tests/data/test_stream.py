"""Which sample comes when, on which rank, with which noise."""

from collections import Counter
from itertools import pairwise, permutations

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dlm_lightning.data.rows import Document, pack
from dlm_lightning.data.stream import TRAIN, VALIDATION, Draw, NoisyRows, Order, TrainStream, ValidationStream, collate
from dlm_lightning.noise import uniforms
from dlm_lightning.view import Batch

LENGTH, PAD, SEED = 5, 99, 3


def global_order(rows, ranks, batch_size, stop, seed=SEED, start=0):
    """All draws of all ranks by micro-batch, rank and sample."""
    streams = [TrainStream(Order(rows, seed), batch_size, rank, ranks, start, stop) for rank in range(ranks)]
    return [draw for micro_batch in zip(*streams, strict=True) for batch in micro_batch for draw in batch]


SHARES = [(ranks, 8 // ranks // accumulate, accumulate) for ranks in (1, 2, 4) for accumulate in (1, 2)]


@pytest.mark.parametrize(("ranks", "batch_size", "accumulate"), SHARES)
def test_an_optimizer_step_sees_the_same_samples_however_they_are_shared_out(ranks, batch_size, accumulate):
    steps = 5
    alone = TrainStream(Order(13, SEED), batch_size=8, rank=0, ranks=1, start=0, stop=steps)
    shared = global_order(13, ranks, batch_size, stop=steps * accumulate)
    assert [shared[8 * step : 8 * step + 8] for step in range(steps)] == list(alone)


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**63))
def test_each_epoch_holds_every_row_once(rows, ranks, batch_size, seed):
    micro_batches = -(-3 * rows // (ranks * batch_size))
    draws = global_order(rows, ranks, batch_size, micro_batches, seed)
    assert [(draw.epoch, draw.place) for draw in draws] == [divmod(n, rows) for n in range(len(draws))]
    for epoch in range(3):
        assert sorted(draw.index for draw in draws if draw.epoch == epoch) == list(range(rows))


@given(st.integers(0, 12), st.integers(1, 3))
def test_a_resumed_stream_goes_on_where_it_stopped(start, ranks):
    whole, rest = (global_order(7, ranks, 2, stop=12, start=k) for k in (0, start))
    assert rest == whole[start * ranks * 2 :]


def test_the_length_is_that_of_the_whole_run_also_when_resumed():
    """Lightning restores the batch index and would otherwise end the run early."""
    stream = TrainStream(Order(7, SEED), batch_size=2, rank=0, ranks=1, start=9, stop=12)
    assert len(stream) == 12 and len(list(stream)) == 3


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        return tuple(d.index for d in global_order(50, 1, 50, stop=3, seed=seed) if d.epoch == epoch)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == 6 and tuple(range(50)) not in orders


def test_the_order_is_a_pure_function_of_the_seed():
    """Pinned: a run that is continued elsewhere, or in a later version, must see the same samples."""
    torch.manual_seed(0)
    first = global_order(6, 1, 6, stop=2, seed=0)
    torch.manual_seed(1)
    assert first == global_order(6, 1, 6, stop=2, seed=0)
    assert [draw.index for draw in first] == [2, 1, 3, 5, 0, 4, 1, 4, 0, 2, 3, 5]


def test_every_order_is_equally_likely():
    epochs = 2400
    draws = global_order(4, 1, 4, stop=epochs)
    counts = Counter(tuple(d.index for d in draws[4 * e : 4 * e + 4]) for e in range(epochs))
    chi_square = sum((counts[order] - 100) ** 2 / 100 for order in permutations(range(4)))
    assert chi_square < 49.7  # 99.9 % point with 23 degrees of freedom


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_validation_takes_spread_rows_once_in_equally_many_batches(take, more, batch_size, ranks):
    streams = [ValidationStream(take + more, take, batch_size, rank, ranks) for rank in range(ranks)]
    batches = [list(stream) for stream in streams]
    assert {len(mine) for mine in batches} == {len(stream) for stream in streams} == {len(streams[0])}
    draws = [draw for mine in batches for batch in mine for draw in batch]
    taken = sorted(d for d in draws if d.index >= 0)
    assert [(d.epoch, d.place) for d in taken] == [(0, place) for place in range(take)]
    gaps = [b.index - a.index for a, b in pairwise(taken)]
    step = (take + more) // take  # rounded down or up
    assert taken[0].index == 0 and taken[-1].index < take + more and set(gaps) <= {step, step + 1}
    padding = [draw for draw in draws if draw.index < 0]
    assert set(padding) <= {Draw(0, -1, -1)} and len(padding) < batch_size * ranks
    assert {len(batch) for mine in batches for batch in mine} == {batch_size}


@pytest.fixture
def rows():
    packed = list(pack([Document(range(n, 2 * n), [True] * n) for n in range(1, 7)], LENGTH, PAD, split=True))
    return packed, datasets.Dataset.from_list([row._asdict() for row in packed]).with_format("numpy")


def noisy(rows, stream=TRAIN):
    return NoisyRows(rows[1], LENGTH, PAD, SEED, stream)


def test_a_batch_holds_the_rows_and_the_uniforms_of_their_samples(rows):
    draws = [Draw(epoch=2, place=3, index=1), Draw(epoch=3, place=0, index=4)]
    batch = collate([noisy(rows)[draw] for draw in draws])
    for n, draw in enumerate(draws):
        for column, mine in zip(rows[0][draw.index], batch[:4], strict=True):
            assert mine[n].tolist() == column.tolist()
        u_L, t_L = uniforms(SEED, TRAIN, place=draw.place, epoch=draw.epoch, view=0, length=LENGTH)
        assert torch.equal(batch.u_BL[n], u_L) and torch.equal(batch.t_BL[n], t_L)
    assert batch.place_B.tolist() == [3, 0]


def test_types_and_shapes_of_a_batch(rows):
    batch = collate([noisy(rows)[Draw(0, 0, 0)], noisy(rows)[Draw(0, -1, -1)], noisy(rows)[Draw(0, 2, 2)]])
    assert isinstance(batch, Batch)
    assert [tuple(tensor.shape) for tensor in batch] == [(3, LENGTH)] * 6 + [(3,)]
    expected = [torch.int64] * 3 + [torch.bool] + [torch.float32] * 2 + [torch.int64]
    assert [tensor.dtype for tensor in batch] == expected


def test_a_row_of_padding_has_nothing_to_score(rows):
    batch = collate([noisy(rows, VALIDATION)[Draw(0, -1, -1)]])
    assert batch.place_B.tolist() == [-1] and not batch.maskable_BL.any()
    assert batch.ids_BL.tolist() == [[PAD] * LENGTH]
    assert (batch.document_BL < 0).all() and len(set(batch.document_BL[0].tolist())) == LENGTH
    assert torch.isfinite(batch.u_BL).all() and (batch.t_BL > 0).all()


def test_training_and_validation_noise_differ(rows):
    draw = Draw(0, 0, 0)
    assert not torch.equal(collate([noisy(rows)[draw]]).u_BL, collate([noisy(rows, VALIDATION)[draw]]).u_BL)


def test_workers_change_nothing(rows):
    def batches(workers):
        stream = TrainStream(Order(len(rows[0]), SEED), batch_size=2, rank=0, ranks=1, start=1, stop=6)
        return list(DataLoader(noisy(rows), batch_sampler=stream, collate_fn=collate, num_workers=workers))

    alone, helped = batches(0), batches(2)
    assert len(alone) == 5
    for mine, theirs in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
