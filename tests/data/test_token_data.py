"""Documents become rows once, the cache knows what it holds, and the loaders follow the trainer."""

import math
import multiprocessing
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch

from dlm_lightning.data import stream
from dlm_lightning.data.rows import Document, pack
from dlm_lightning.data.stream import VALIDATION
from dlm_lightning.data.token_data import TokenData
from dlm_lightning.noise import uniforms

TRAIN = ["abc", "hello", "zz", "a"]
IDS = {letter: n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}


def columns(rows):
    return [{name: column.tolist() for name, column in row.items()} for row in rows]


def unsplit(data):
    data.splits_documents = False
    return data


def test_rows_are_the_packed_documents_each_closed_by_end_of_text(given, ready):
    data = ready(given(TRAIN, val=[("ab", "cd")]))
    documents = [Document([*(IDS[c] for c in text), 0], [True] * (len(text) + 1)) for text in TRAIN]
    expected = [row._asdict() for row in pack(documents, 8, 0, split=True)]
    assert columns(data.rows["train"]) == columns(expected)
    row = columns(data.rows["val"])[0]
    assert row["ids"][:5] == [1, 2, 3, 4, 0] and row["maskable"][:5] == [False, False, True, True, True]


def test_a_data_module_that_does_not_split_documents(given, ready):
    data = given(["abcde", "abcde"])
    data.splits_documents = False
    assert [row["ids"] for row in columns(ready(data).rows["train"])] == [[1, 2, 3, 4, 5, 0, 0, 0]] * 2


def test_unpacked_each_document_has_rows_of_its_own(given, ready):
    rows = columns(ready(given(["abcdefghij", "k"], pack=False)).rows["train"])
    assert [row["ids"] for row in rows] == [[*range(1, 9)], [9, 10, 0, 0, 0, 0, 0, 0], [11, 0, 0, 0, 0, 0, 0, 0]]
    assert [row["position"][:3] for row in rows] == [[0, 1, 2], [8, 9, 10], [0, 1, 0]]


def test_a_split_of_which_nothing_can_be_masked_says_why(given, ready):
    with pytest.raises(ValueError, match=r"the train split is empty; .*: all 2 have nothing to mask in a row of .* 8$"):
        ready(unsplit(given([("abcdefgh", "i"), ("abcdefghi", "j")])))


def test_prompts_are_beginnings_of_validation_documents(given, ready):
    data = ready(given(TRAIN, val=["abcdefghijk", "lmnopq", "rs"]))
    assert [row["ids"] for row in columns(data.rows["val"])] == [
        [*range(1, 9)],
        [9, 10, 11, 0, 12, 13, 14, 15],
        [16, 17, 0, 18, 19, 0, 0, 0],
    ]
    assert data.prompts(3) == [[1, 2, 3, 4], [9, 10], [16]]
    assert data.prompts(2) == [[1, 2, 3, 4], [9, 10]]
    assert len(data.prompts(9)) == 3


def test_a_prompt_is_what_precedes_an_answer(given, ready):
    data = ready(unsplit(given(TRAIN, val=[("ab", "cd"), ("efgh", "i"), ("jk", "l")])))
    assert data.prompts(3) == [[1, 2], [5, 6, 7, 8], [10, 11]]


def test_the_end_of_another_document_is_no_prompt(given, ready):
    data = ready(given(TRAIN, val=["abcdefgh", "ijklm"]))
    assert columns(data.rows["val"])[1]["ids"][:3] == [0, 9, 10]
    assert data.prompts(2)[1] == [9, 10, 11]


# The cache


def test_a_second_run_reads_nothing_again(given, ready):
    first, second = ready(given(TRAIN)), ready(given(TRAIN, seed=5, batch_size=2, val_rows=1))
    assert first.reads == ["train", "val"] and second.reads == []
    assert columns(second.rows["train"]) == columns(first.rows["train"])


def test_set_up_alone_builds_what_is_missing_and_only_once(given, attach):
    data = attach(given(TRAIN))
    data.setup("fit")
    rows = data.rows
    data.setup("validate")
    assert data.reads == ["train", "val"] and data.rows is rows


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda given, characters: (given(TRAIN, name="other"), characters()), id="documents"),
        pytest.param(lambda given, characters: (given(TRAIN, row_length=4), characters()), id="row length"),
        pytest.param(
            lambda given, characters: (given(TRAIN), characters("zyxwvutsrqponmlkjihgfedcba")), id="tokenizer"
        ),
        pytest.param(lambda given, characters: (given(TRAIN), characters(eos_token="<end>")), id="end of text"),
        pytest.param(lambda given, characters: (unsplit(given(TRAIN)), characters()), id="splitting"),
        pytest.param(lambda given, characters: (given(TRAIN, pack=False), characters()), id="packing"),
    ],
)
def test_what_the_rows_are_made_of_names_the_cache(given, ready, characters, change):
    before = ready(given(TRAIN))
    data, tokenizer = change(given, characters)
    after = ready(data, tokenizer)
    assert after.reads == ["train", "val"] and after.facts()["data"] != before.facts()["data"]


def test_building_does_not_pickle_the_trainer(given, ready):
    """The stand-in trainer refuses; the real one would drag the model along."""
    assert len(ready(given(TRAIN)).rows["train"]) == 2


FORK = multiprocessing.get_context("fork")


def test_a_killed_build_leaves_the_cache_usable(given, ready, attach):
    class Killed(type(given([]))):
        def texts(self, split):
            for n, document in enumerate(super().texts(split)):
                if n == 3000:  # the writer has written some rows by then
                    os.kill(os.getpid(), signal.SIGKILL)
                yield document

    documents = ["abcdefg"] * 4000
    killed = attach(given(documents))
    killed.__class__ = Killed
    child = FORK.Process(target=killed.prepare_data)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert any(file.stat().st_size for file in killed.cache_dir.rglob("*.incomplete/*.arrow"))
    data = ready(given(documents))
    assert data.reads == ["train", "val"] and len(data.rows["train"]) == 4000


def test_a_failed_build_tells_why_and_leaves_the_cache_usable(given, ready, attach):
    with pytest.raises(ZeroDivisionError, match="by zero"):
        attach(given("a" * (1 // n) for n in (1, 0))).prepare_data()
    assert len(ready(given(TRAIN)).rows["train"]) == 2


def test_two_runs_may_build_at_once(given, attach):
    second_has_begun, readings = FORK.Event(), FORK.Value("i", 0)

    class Slow(type(given([]))):
        def texts(self, split):
            assert second_has_begun.wait(60)
            readings.value += 1
            yield from super().texts(split)

    def build():
        data = attach(given(TRAIN))
        data.__class__ = Slow
        data.prepare_data()
        assert len(data._packed("train")) == 2

    def build_second():
        second_has_begun.set()
        build()

    children = [FORK.Process(target=target) for target in (build, build_second)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert readings.value == 2  # one for each split


def test_the_cache_lies_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TokenData().cache_dir == tmp_path / "dlm_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TokenData().cache_dir == tmp_path / ".cache" / "dlm_lightning"
    assert TokenData(cache_dir="~/here").cache_dir == tmp_path / "here"


# Facts of the data


def test_unigram_entropy_is_that_of_the_tokens_without_the_padding(given, ready):
    data = ready(given(TRAIN))
    counts = Counter("".join(text + "$" for text in TRAIN))
    total = sum(counts.values())
    assert total % 8  # there is padding, of the same id as end of text
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert data.unigram_entropy() == pytest.approx(expected, abs=1e-12)


def test_token_counts_hold_over_many_rows(given, ready):
    """More rows than the writer puts into one chunk."""
    letters = np.random.default_rng(0).choice(list(IDS), size=20_000).tolist()
    data = ready(given(["".join(letters)], row_length=4))
    assert len(data.rows["train"].data.column("ids").chunks) > 1
    expected = Counter(letters)
    assert data.counts_V[1:27].tolist() == [expected[letter] for letter in IDS]
    assert data.counts_V[0] == 1 and data.counts_V.sum() == 20_001


def test_a_mask_token_that_occurs_in_the_data_is_refused(given, ready):
    with pytest.raises(ValueError, match=r"model.mask_token: id 26 occurs 2 times in the data"):
        ready(given(TRAIN), mask_id=IDS["z"])
    assert ready(given(TRAIN), mask_id=IDS["y"]).counts_V[IDS["y"]] == 0
    assert ready(given(TRAIN), mask_id=len(IDS) + 2)


def test_facts_are_what_a_continued_run_must_share(given, ready):
    def facts(seed=0, batch_size=4, **trainer):
        return ready(given(TRAIN, seed=seed, batch_size=batch_size), **trainer).facts()

    mine = facts(world_size=2, accumulate_grad_batches=3)
    assert mine == {"data": mine["data"], "data.seed": 0, "global batch size": 24}
    assert facts(batch_size=12, world_size=2) == mine
    assert facts(seed=1)["data.seed"] == 1


def test_facts_stay_as_they_are_when_a_callback_pads(given, ready, characters):
    """Padding is a state of the fast tokenizer, and part of its serialised form."""
    tokenizer = characters()
    data = ready(given(TRAIN), tokenizer)
    before = data.facts()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "abc"], padding=True)
    assert data.facts() == before


# The tokenizer


def test_without_a_source_a_tokenizer_is_trained_on_the_training_split(given, ready):
    data = ready(given(["abab " * 20, "cdcd"], val=["xyxyxy " * 20], vocab_size=260), tokenizer=None)
    assert len(data.tokenizer) == 260
    assert len(data.tokenizer("abab")["input_ids"]) < 4 and len(data.tokenizer("xyxy")["input_ids"]) == 4
    assert ready(given(["abab " * 20, "cdcd"], vocab_size=260), tokenizer=None).reads == []


def test_without_a_source_the_vocabulary_needs_a_size(given, ready):
    with pytest.raises(ValueError, match=r"data.vocab_size must be set"):
        ready(given(TRAIN), tokenizer=None)


def test_a_tokenizer_without_end_of_text_is_refused(given, ready, characters):
    with pytest.raises(ValueError, match="no end-of-text token"):
        ready(given(TRAIN), characters(eos_token=None))


# Loaders

DOCUMENTS = ["abcdefg", "bcdefgh", "cdefghi", "defghij", "efghijk"]


def loaded(given, ready, loader="train_dataloader", batch_size=2, **trainer):
    """All batches of all ranks by micro-batch, then rank."""
    world_size = trainer.pop("world_size", 1)
    batches = []
    for rank in range(world_size):
        data = given(DOCUMENTS, val=DOCUMENTS, batch_size=batch_size)
        ready(data, global_rank=rank, world_size=world_size, **trainer)
        batches.append(list(getattr(data, loader)()))
    return [batch for together in zip(*batches, strict=True) for batch in together]


def joined(batches):
    return [torch.cat(tensors) for tensors in zip(*batches, strict=True)]


def test_a_run_has_max_steps_times_accumulation_micro_batches(given, ready):
    batches = loaded(given, ready, max_steps=4, accumulate_grad_batches=3)
    assert len(batches) == 12
    assert torch.cat([batch.place_B for batch in batches]).tolist() == [n % 5 for n in range(24)]


def test_the_samples_of_a_step_are_those_that_its_ranks_load_for_it(given, ready):
    spread = {"world_size": 2, "accumulate_grad_batches": 2, "max_steps": 4}
    batches = loaded(given, ready, **spread)
    data = ready(given(DOCUMENTS, val=DOCUMENTS, batch_size=2), **spread)
    rows, epochs = columns(data.rows["train"]), set()
    for step in range(1, 5):
        samples = data.samples_of(step)
        together = joined(batches[4 * (step - 1) : 4 * step])
        where = [(micro_batch, rank) for micro_batch in range(2) for rank in range(2) for _ in range(2)]
        assert [(sample.micro_batch, sample.rank) for sample in samples] == where
        assert [sample.place for sample in samples] == together[-1].tolist()
        assert [rows[sample.row]["ids"] for sample in samples] == together[0].tolist()
        noise = [uniforms(0, stream.TRAIN, sample.place, sample.epoch, view=0, length=8)[0] for sample in samples]
        assert torch.equal(torch.stack(noise), together[4])
        epochs |= {sample.epoch for sample in samples}
    assert epochs == set(range(7))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_validation_sees_each_row_once_with_the_same_noise_each_time(given, ready, world_size):
    batches = loaded(given, ready, "val_dataloader", world_size=world_size)
    again = loaded(given, ready, "val_dataloader", world_size=1, batch_size=1, global_step=3)
    real = [tensor[joined(batches)[-1] >= 0] for tensor in joined(batches)]
    assert all(torch.equal(a, b) for a, b in zip(real, joined(again), strict=True))
    assert real[-1].tolist() == list(range(5))
    noise = [uniforms(0, VALIDATION, place, epoch=0, view=0, length=8)[0] for place in range(5)]
    assert torch.equal(real[4], torch.stack(noise))


@pytest.mark.parametrize(("val_rows", "seen"), [(None, 5), (3, 3), (64, 5)])
def test_val_rows_bounds_what_is_validated(given, ready, val_rows, seen):
    data = ready(given(TRAIN, val=DOCUMENTS, val_rows=val_rows, batch_size=1))
    assert len(list(data.val_dataloader())) == seen


def test_a_run_without_an_end_is_refused(given, ready):
    with pytest.raises(ValueError, match=r"trainer.max_steps must be set"):
        ready(given(TRAIN), max_steps=-1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_refused(given, ready, split):
    with pytest.raises(ValueError, match=f"data: the {split} split is empty; it needs more documents"):
        ready(given(**{"train": TRAIN, "val": TRAIN, split: []}))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        *(("row_length", 1, 2), ("row_length", 0, 2), ("batch_size", 0, 1), ("val_rows", 0, 1), ("val_rows", -1, 1)),
        ("num_workers", -1, 0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"data.{name} must be at least {least}, not {value}"):
        TokenData(**{name: value})
