"""What is said of the data before training, against counts made by hand."""

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from dlm_lightning.data.report import RUN, SAMPLE, marked, quantile
from dlm_lightning.data.rows import Document, Tally, pack


@pytest.fixture
def said(caplog):
    """Makes a list of the lines that were logged since."""

    def lines():
        return "\n".join(record.message for record in caplog.records if record.name.startswith("dlm")).splitlines()

    with caplog.at_level(logging.INFO, "dlm_lightning"):
        yield lines


def test_the_lines_by_hand(given, ready, said):
    """Six documents of 2, 3, 3, 5, 9 and 10 tokens in rows of 8; the longest has nothing but its prompt in the row."""
    data = given(["a", "ab", "cd", "efgh", "abcdefgh", ("abcdefgh", "x")], val=["ab"])
    data.splits_documents = False
    ready(data)
    first, lengths, validation, sample = said()
    assert first == (
        "data: 6 documents, 21 tokens in 3 rows of 8, 87.5% full; 9 of 28 tokens of the vocabulary occur (32.1%)"
    )
    assert lengths == (
        "  lengths in tokens: median 3, 95th percentile 10, longest 10; 16.7% of the documents are cut at a row's end, "
        "16.7% left out with nothing to mask"
    )
    assert validation == "  validation: 1 documents, 3 tokens in 1 rows of 8, 37.5% full; 12.5% of all tokens"
    assert sample.startswith("  first sample, what may be masked in ⟦ ⟧: ")


@pytest.mark.parametrize("splits", [True, False])
def test_documents_beyond_the_models_positions_are_counted_and_name_the_rows(given, ready, splits):
    def data(positions):
        made = given(["a", "abcd", "abcde", "efghijk"], row_length=16)
        made.splits_documents = splits
        return ready(made, positions=positions)

    here = data(positions=5)
    assert here.report()[1].endswith("; 2 are longer than the model's 5 positions")
    rows = here.rows["train"]
    assert max(int(row["position"].max()) for row in rows) == 4
    assert here.tallies["train"].truncated == (0 if splits else 2)
    longest = data(positions=None)
    assert max(int(row["position"].max()) for row in longest.rows["train"]) == 7
    assert longest.report()[1].endswith("left out with nothing to mask")
    assert len({made.facts()["data"] for made in (here, longest, data(positions=4))}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_it_is_said_once_for_a_fit_by_one_rank_and_not_for_its_validations(given, attach, said, rank):
    data = attach(given(["abc"]), global_rank=rank, world_size=2)
    for stage, lines in (("validate", 0), ("fit", 4), ("validate", 4)):
        data.setup(stage)
        assert len(said()) == (lines if rank == 0 else 0)


def test_the_sample_is_the_first_that_is_drawn(given, ready, said):
    data = ready(given(["abcdefg", "hijklmn", "opqrstu"]))
    ids = data.rows["train"][data.order.draw(0).index]["ids"]
    letter = "abcdefghijklmnopqrstuvwxyz"[ids[0] - 1]
    assert said()[-1].split(": ", 1)[1].startswith(f"{letter}⟦")


LETTERS = ["abc", "hello", "zz", "a"]


def test_the_tally_lies_beside_the_rows_and_is_made_again_if_it_is_lost(given, ready):
    first = ready(given(LETTERS))
    assert first.tallies["train"] == Tally(Counter(len(text) + 1 for text in LETTERS), tokens=15)
    assert ready(given(LETTERS)).tallies == first.tallies
    (file,) = (first.cache_dir / "rows").glob("*-train.json")
    file.unlink()
    again = ready(given(LETTERS))
    assert again.tallies == first.tallies and again.reads == ["train"] and file.is_file()
    assert ready(given(LETTERS)).reads == []


def row(documents, characters, length=400):
    """The first row of (prompt, answer) documents."""
    tokenizer = characters()
    packed = []
    for prompt, answer in documents:
        ids = [tokenizer.convert_tokens_to_ids(letter) for letter in prompt + answer]
        packed.append(Document(ids, [False] * len(prompt) + [True] * len(answer)))
    return next(pack(packed, length, 0, split=True))._asdict(), tokenizer


def plain(text):
    return text.replace(" ", "")


def test_what_may_be_masked_stands_in_brackets(characters):
    """The first token of a document cannot be, and padding is not shown."""
    one = row([("abc", "de"), ("", "fgh"), ("ij", "")], characters)
    assert plain(marked(*one)) == "abc⟦de⟧f⟦gh⟧ij"


def test_long_stretches_are_shortened_in_their_middle_so_that_the_answer_is_seen(characters):
    one = row([("a" * 150 + "b", "cd")], characters)
    text = marked(*one)
    assert text.startswith("a") and "…" in text and plain(text).endswith("ab⟦cd⟧") and len(text) < RUN + 20


def test_many_stretches_end_somewhere(characters):
    one = row([("ab", "cd")] * 99, characters)
    text = marked(*one)
    assert text.endswith(" …") and len(text) < SAMPLE + RUN


def test_a_sample_is_one_line(ready, given, tmp_path):
    data = ready(given(["a\nb\n" * 20], vocab_size=258), tokenizer=None)
    assert data.report()[-1].count("⏎") > 2 and "\n" not in data.report()[-1]


@given_any(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.sampled_from([0.5, 0.95]))
def test_quantiles_are_numpys(lengths, share):
    assert quantile(Counter(lengths), share) == np.quantile(lengths, share, method="inverted_cdf")
