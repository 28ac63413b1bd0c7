"""Several modules as one: which draw falls to which part, what belongs to whom, and the recipe that says so."""

import json
import os
import re
import shutil
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given as given_any
from hypothesis import strategies as st

from dlm_lightning import catalog
from dlm_lightning.data.exact_answers import ExactAnswers
from dlm_lightning.data.mixture import Mixture
from dlm_lightning.data.stream import Draw, MixedOrder, share_out
from dlm_lightning.data.text_files import TextFiles
from dlm_lightning.parsing import parse
from dlm_lightning.training import _pin

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@st.composite
def mixtures(draw):
    rows = draw(sizes)
    weights = draw(st.none() | st.lists(st.floats(0.05, 20), min_size=len(rows), max_size=len(rows)))
    return MixedOrder(rows, weights, draw(st.integers(0, 2**63)))


def drawn(order, epochs):
    """(part, row of the part) of each draw."""
    first = np.cumsum([0, *(part.rows for part in order._parts)])
    draws = [order.draw(n) for n in range(epochs * order.rows)]
    parts = [int(np.searchsorted(first, draw.index, side="right")) - 1 for draw in draws]
    return draws, [(part, draw.index - int(first[part])) for part, draw in zip(parts, draws, strict=True)]


# The order


@given_any(mixtures())
def test_every_epoch_has_as_many_draws_of_a_part_as_was_said(order):
    draws, rows = drawn(order, 3)
    assert [(draw.epoch, draw.place) for draw in draws] == [divmod(n, order.rows) for n in range(3 * order.rows)]
    for epoch in range(3):
        counts = Counter(part for part, _ in rows[epoch * order.rows : (epoch + 1) * order.rows])
        assert [counts[part] for part in range(len(order.draws))] == order.draws


@given_any(mixtures())
def test_every_row_of_a_part_comes_once_before_any_comes_twice(order):
    _, rows = drawn(order, 4)
    for part, size in enumerate(own.rows for own in order._parts):
        mine = [row for which, row in rows if which == part]
        for start in range(0, len(mine), size):
            turn = mine[start : start + size]
            assert len(set(turn)) == len(turn)
            assert len(turn) < size or sorted(turn) == list(range(size))


@given_any(sizes, st.integers(0, 2**63))
def test_without_weights_an_epoch_holds_every_row_once(rows, seed):
    order = MixedOrder(rows, None, seed)
    for epoch in range(2):
        draws = [order.draw(epoch * order.rows + place).index for place in range(order.rows)]
        assert sorted(draws) == list(range(sum(rows)))


@given_any(mixtures(), st.data())
def test_a_draw_depends_on_its_number_alone(order, data):
    draws, _ = drawn(order, 3)
    fresh = MixedOrder([part.rows for part in order._parts], order.draws, order.seed)
    for n in data.draw(st.permutations(range(len(draws))))[:20]:
        assert fresh.draw(n) == draws[n]


def test_the_order_is_pinned():
    """A run that is continued in a later version must see the same samples."""
    order = MixedOrder([3, 2], [1, 2], seed=0)
    assert order.draws == [2, 3]
    assert [order.draw(n) for n in range(10)] == [
        Draw(n // 5, n % 5, index) for n, index in enumerate([2, 4, 3, 3, 1, 4, 3, 4, 0, 1])
    ]


def test_places_of_a_part_are_shuffled_and_differ_from_epoch_to_epoch():
    order = MixedOrder([30, 30], None, seed=1)
    _, rows = drawn(order, 2)
    turns = [tuple(part for part, _ in rows[start : start + 60]) for start in (0, 60)]
    assert turns[0] != turns[1] and tuple(sorted(turns[0])) not in turns


@given_any(st.integers(0, 500), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_within_one_of_exact_and_the_largest_remainders_get_more(count, weights):
    shares = share_out(count, weights)
    exact = [count * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert sum(shares) == count
    assert all(share - 1 < whole < share + 1 for share, whole in zip(exact, shares, strict=True))
    up = [share - int(share) for share, whole in zip(exact, shares, strict=True) if whole > share]
    down = [share - int(share) for share, whole in zip(exact, shares, strict=True) if whole <= share and share % 1]
    assert not up or not down or min(up) >= max(down)


def test_ties_go_to_the_first():
    assert share_out(3, [1, 1]) == [2, 1] and share_out(2, [1, 1, 1, 1]) == [1, 1, 0, 0]


# The module

LETTERS = ["abcdefg", "bcdefgh", "cdefghi", "defghij"]


@pytest.fixture
def mixture(given, tmp_path):
    """A mixture of four and two rows of eight tokens; the second part has a validation split of its own."""

    def make(**options):
        parts = [given(LETTERS, name="one", cache_dir=None, row_length=256)]
        parts.append(given(["zyxwvut", "yxwvuts"], val=["zz", "yy"], name="two", cache_dir=None, row_length=256))
        return Mixture(parts, **{"row_length": 8, "cache_dir": str(tmp_path / "cache"), **options})

    return make


def decoded(data, split):
    return [data.tokenizer.decode(row["ids"]).replace("<eos>", ".").rstrip(" .") for row in data.rows[split]]


def test_the_parts_rows_lie_one_after_another_in_both_splits(mixture, ready):
    data = ready(mixture())
    assert [text.replace(" ", "") for text in decoded(data, "train")] == [*LETTERS, "zyxwvut", "yxwvuts"]
    assert [text.replace(" ", "") for text in decoded(data, "val")] == ["val", "zz.yy"]


def test_unigram_entropy_is_that_of_what_is_drawn(mixture, ready):
    data = ready(mixture(weights=[1, 5]))
    counts = Counter()
    for n in range(6 * 20):  # whole epochs of both parts
        counts.update(data.rows["train"][data.order.draw(n).index]["ids"].tolist())
    p = np.array(list(counts.values())) / counts.total()
    assert data.order.draws == [1, 5]
    assert data.unigram_entropy() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


def test_the_tokenizer_is_trained_on_all_parts(given, ready, tmp_path):
    parts = [given([text * 20], name=text, cache_dir=None, row_length=256) for text in ("abab ", "xyxy ")]
    data = ready(Mixture(parts, vocab_size=262, row_length=8, cache_dir=str(tmp_path / "c")), tokenizer=None)
    assert all(len(data.tokenizer(text)["input_ids"]) < 4 for text in ("abab", "xyxy"))
    assert all(part.tokenizer is data.tokenizer for part in parts)


def test_weights_and_parts_are_facts_of_a_run(mixture, given, ready):
    facts = ready(mixture(weights=[1, 2])).facts()
    assert facts == ready(mixture(weights=[1, 2])).facts() and facts["data.weights"] == [1, 2]
    assert ready(mixture()).facts()["data"] == facts["data"]
    other = Mixture([given(LETTERS, name="other", cache_dir=None, row_length=256)], row_length=8)
    assert ready(other).facts()["data"] != facts["data"]


def test_the_report_tells_the_parts_and_their_draws(mixture, ready):
    lines = ready(mixture(weights=[1, 2])).report()
    assert lines[1:3] == [
        "  part 0, Given: 4 documents, 32 tokens in 4 rows of 8, 100.0% full; 2 draws per epoch (33.3%)",
        "  part 1, Given: 2 documents, 16 tokens in 2 rows of 8, 100.0% full; 4 draws per epoch (66.7%)",
    ]
    assert lines[0].startswith("data: 6 documents, 48 tokens in 6 rows of 8, 100.0% full; ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("row_length", 8), ("batch_size", 2), ("val_rows", None), ("vocab_size", 300), ("pack", False), ("seed", 1),
        ("num_workers", 2), ("cache_dir", "there"),
    ],
)  # fmt: skip
def test_what_the_mixture_says_is_refused_in_a_part_and_given_to_it(key, value):
    with pytest.raises(ValueError, match=rf"^data.parts.1.{key} is the mixture's to say; give data.{key}$"):
        Mixture([ExactAnswers(), ExactAnswers(**{key: value})])
    part = ExactAnswers()
    mixture = Mixture([part], **{key: value})
    assert getattr(part, key) == getattr(mixture, key) != getattr(ExactAnswers(), key)


@pytest.mark.parametrize(
    ("parts", "weights", "says"),
    [
        (0, None, "data.parts must name at least one"),
        (2, [1.0], "data.weights: there are 1 for the 2 of data.parts"),
        (2, [1.0, 0.0], r"data.weights must be above 0, not \[1.0, 0.0\]"),
        (2, [1.0, float("inf")], "data.weights must be above 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(parts, weights, says):
    with pytest.raises(ValueError, match=says):
        Mixture([ExactAnswers() for _ in range(parts)], weights)


def test_a_mixture_in_a_mixture_is_refused():
    with pytest.raises(ValueError, match=r"data.parts.0 is a mixture itself"):
        Mixture([Mixture([ExactAnswers()])])


def test_a_weight_under_which_a_part_never_comes_is_refused(mixture, ready):
    with pytest.raises(ValueError, match=r"data.weights: of the 6 draws of an epoch none falls to data.parts.1"):
        ready(mixture(weights=[100, 1]))


# The recipe


def recipe(parts, **keys):
    composed = catalog.compose(catalog.find("block_causal").path)
    init_args = {"parts": parts, **keys}
    return {**composed, "data": {"class_path": "dlm_lightning.data.mixture.Mixture", "init_args": init_args}}


TEXT = {"class_path": "dlm_lightning.data.text_files.TextFiles", "init_args": {"paths": ["texts", "s3://bucket/a"]}}
ANSWERS = {"class_path": "dlm_lightning.data.exact_answers.ExactAnswers"}


def test_a_recipe_names_the_parts_and_is_printed_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = parse(recipe([TEXT, ANSWERS], weights=[1, 3], row_length=32), [], "run")
    first, second = cli.datamodule.parts
    assert isinstance(first, TextFiles) and isinstance(second, ExactAnswers)
    assert (first.row_length, second.row_length, cli.datamodule.weights) == (32, 32, [1, 3])
    _pin(cli)
    printed = cli.parser.dump(cli.config, skip_none=False)
    kept = yaml.safe_load(printed)
    assert kept["data"]["init_args"]["parts"][0]["init_args"]["paths"] == [f"{tmp_path}/texts", "s3://bucket/a"]
    monkeypatch.chdir("/")
    del kept["trainer"]["default_root_dir"]
    again = parse(kept, [], "run")
    assert again.datamodule.parts[0].paths == [f"{tmp_path}/texts", "s3://bucket/a"]
    assert again.parser.dump(again.config, skip_none=False) == printed


@pytest.mark.parametrize(
    ("parts", "overrides", "says"),
    [
        ([TEXT, {**ANSWERS, "init_args": {"seed": 1}}], [], r"data.parts.1.seed is the mixture's to say"),
        ([TEXT, {**ANSWERS, "init_args": {"sample": 30}}], [], "data.parts: .*sample"),
        ([TEXT, {"class_path": "ExactAnswer"}], [], "data.parts: .*ExactAnswer"),
        ([TEXT], ["data.parts.0.init_args.val_share=0.2"], "data.parts: .*val_share"),
    ],
)
def test_a_mistake_in_a_part_is_one_sentence(parts, overrides, says, refused, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(parts)))
    assert re.search(says, refused("fit", "mine.yaml", *overrides, cwd=tmp_path))


def test_a_mixture_trains_and_goes_on_after_its_files_were_touched(typed, small, corpus, tmp_path):
    """From another folder than the one that its relative path was meant from."""
    (tmp_path / "texts").mkdir()
    for file in corpus.iterdir():
        (tmp_path / "texts" / file.name).write_bytes(file.read_bytes())
    records = [{"text": f"seven wizards judge quartz {n}"} for n in range(40)]
    (tmp_path / "texts" / "more.jsonl").write_text("\n".join(map(json.dumps, records)))
    parts = [{**TEXT, "init_args": {"paths": ["texts"], "val_share": 0.2}}, {**ANSWERS, "init_args": {"samples": 50}}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(parts, weights=[1, 1], row_length=24, batch_size=4)))
    keeps = "[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints, init_args: {every_n_steps: 2, keep: 9}}]"
    own = ("data.paths", "data.val_share")  # the parts' here
    words = [word for word in small(trainer__callbacks=keeps) if word.split("=")[0] not in own]
    said = typed("fit", "mine.yaml", *words, "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    [start] = [n for n, line in enumerate(lines) if line.startswith("data: ")]
    assert "part 0, TextFiles" in lines[start + 1] and "draws per epoch (50.2%)" in lines[start + 1]
    last = tmp_path / "run" / "checkpoints" / "step=6"
    weights = torch.load(last / "state.ckpt", weights_only=True)["state_dict"]
    shutil.rmtree(last)
    for file in (tmp_path / "texts").iterdir():
        os.utime(file, ns=(0, 1))
    (tmp_path / "elsewhere").mkdir()
    resumed = typed("resume", "../run", cwd=tmp_path / "elsewhere")
    assert resumed.code == 0, resumed.err
    again = torch.load(last / "state.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert "data: " not in typed("validate", "../run", cwd=tmp_path / "elsewhere").out
