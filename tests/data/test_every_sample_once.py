"""Each sample once an epoch, in one order and with one noise, for any module, ranks, workers and point of resuming."""

from collections import Counter
from itertools import product

import datasets
import pytest
import torch

from dlm_lightning.data.exact_answers import ExactAnswers
from dlm_lightning.data.hub_text import HubText
from dlm_lightning.data.mixture import Mixture
from dlm_lightning.data.stream import TRAIN
from dlm_lightning.data.text_files import TextFiles
from dlm_lightning.noise import uniforms
from dlm_lightning.view import Batch

GLOBAL_BATCH, LENGTH = 8, 24


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for n in range(12):
        (folder / f"{n}.txt").write_text(" ".join(f"word {n} {m}" for m in range(3 * n)))
    return str(folder)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    rows = datasets.Dataset.from_list([{"text": f"record {n} " * (n % 4 + 3)} for n in range(40)])
    rows.to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.fixture
def modules(text, table, cache, monkeypatch, tmp_path):
    """How to make each data module, by its name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    own = {"row_length": LENGTH, "vocab_size": 270, "cache_dir": cache}

    def parts():
        return [TextFiles([text]), HubText(table), ExactAnswers(samples=15)]

    return {
        "TextFiles": lambda **options: TextFiles([text], **own, **options),
        "HubText": lambda **options: HubText(table, **own, **options),
        "ExactAnswers": lambda **options: ExactAnswers(samples=60, **own, **options),
        "Mixture": lambda **options: Mixture(parts(), **own, **options),
        "weighted": lambda **options: Mixture(parts(), [1, 2, 3], **own, **options),
    }


def run(make, ready, ranks=1, workers=0, accumulate=1, steps=None, step=0):
    """All samples of a run in the global order, as one batch, and the data module of the last rank."""
    loaded = []
    for rank in range(ranks):
        data = make(batch_size=GLOBAL_BATCH // ranks // accumulate, num_workers=workers)
        trainer = {"global_rank": rank, "world_size": ranks, "accumulate_grad_batches": accumulate}
        ready(data, tokenizer=None, global_step=step, max_steps=steps or 99, **trainer)
        loaded.append(list(data.train_dataloader()) if steps else [])
    in_order = [batch for together in zip(*loaded, strict=True) for batch in together]
    return Batch(*(torch.cat(column) for column in zip(*in_order, strict=True))) if steps else None, data


def steps_of(data):
    """Optimizer steps that see a whole epoch."""
    return -(-len(data.rows["train"]) // GLOBAL_BATCH)


@pytest.fixture
def reference(ready):
    """One rank without workers; checked sample by sample against the rows and the noise that they are due."""

    def check(make):
        _, data = run(make, ready)
        rows = len(data.rows["train"])
        batch, data = run(make, ready, steps=steps_of(data))
        assert batch.place_B.tolist()[:rows] == list(range(rows))
        for n in range(rows):
            row = data.rows["train"][data.order.draw(n).index]
            assert batch.ids_BL[n].tolist() == row["ids"].tolist()
            assert batch.maskable_BL[n].tolist() == row["maskable"].tolist()
            u_L, t_L = uniforms(data.seed, TRAIN, n, 0, 0, LENGTH)
            assert torch.equal(batch.u_BL[n], u_L) and torch.equal(batch.t_BL[n], t_L)
        return batch, data

    return check


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


NAMES = ["TextFiles", "HubText", "ExactAnswers", "Mixture", "weighted"]


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_once_in_one_order_with_one_noise(name, modules, ready, reference):
    whole, data = reference(modules[name])
    steps, rows = steps_of(data), len(data.rows["train"])
    assert steps >= 3
    drawn = Counter(data.order.draw(n).index for n in range(rows))
    if name != "weighted":
        assert drawn == Counter(range(rows))
    for shares in [*product((1, 2, 4), (0, 2), (1,)), (1, 0, 4), (2, 0, 2)]:  # ranks, workers, accumulation
        batch, _ = run(modules[name], ready, *shares, steps=steps)
        assert same(batch, whole), shares


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shares", [(1, 0, 1), (2, 2, 1), (4, 0, 2)], ids=str)
def test_a_run_that_is_resumed_in_the_middle_sees_the_rest(name, shares, modules, ready, reference):
    whole, data = reference(modules[name])
    steps = steps_of(data)
    middle = steps // 2
    rest, _ = run(modules[name], ready, *shares, steps=steps, step=middle)
    assert same(rest, Batch(*(column[middle * GLOBAL_BATCH :] for column in whole)))


def test_a_weighted_mixture_gives_every_row_of_a_part_once_before_any_twice(modules, ready):
    _, data = run(modules["weighted"], ready)
    rows = [len(part.rows["train"]) for part in data.parts]
    draws = [data.order.draw(n).index for n in range(4 * sum(rows))]
    first = 0
    for size in rows:
        mine = [index for index in draws if first <= index < first + size]
        assert len(mine) > size
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(first, first + size))
        first += size
