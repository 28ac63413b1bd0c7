"""The trained tokenizer: lossless, of the size asked for, and trained once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_lightning.data.tokenizer import END_OF_TEXT, trained_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n"] * 3 + ["naïve café — ☕\n"] * 3
SIZE = 280


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return trained_tokenizer(lambda: TEXTS, SIZE, tmp_path_factory.mktemp("tokenizers") / "trained")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.parametrize("text", ["", " ", "  a  b ", "\r\n\t\0", "a , b . n't", "👩‍👩‍👧", "e\u0301 \ufeff", "ﬁ Å"])
def test_spaces_controls_and_unnormalised_text_survive(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_it_works_on_bytes_with_one_special_token(tokenizer):
    unseen = "語"  # not in the corpus: one token per byte
    assert len(encode(tokenizer, unseen)) == len(unseen.encode())
    assert tokenizer.all_special_tokens == [END_OF_TEXT]
    assert encode(tokenizer, END_OF_TEXT) == [tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in encode(tokenizer, "".join(TEXTS))


def test_it_has_the_size_asked_for_and_merges_what_is_frequent(tokenizer):
    assert len(tokenizer) == SIZE and sorted(tokenizer.get_vocab().values()) == list(range(SIZE))
    assert len(encode(tokenizer, TEXTS[0])) < 0.6 * len(TEXTS[0])


def test_nothing_is_added_around_a_text(tokenizer):
    assert tokenizer("return")["input_ids"] == encode(tokenizer, "return")


def test_a_vocabulary_of_bytes_alone_is_the_smallest(tmp_path):
    smallest = trained_tokenizer(lambda: TEXTS, 257, tmp_path / "257")
    assert len(encode(smallest, TEXTS[0])) == len(TEXTS[0].encode())
    with pytest.raises(ValueError, match=r"data.vocab_size must be above 256 .*, not 256"):
        trained_tokenizer(lambda: TEXTS, 256, tmp_path / "256")


def test_it_is_trained_once(tokenizer, tmp_path):
    first = trained_tokenizer(lambda: TEXTS, SIZE, tmp_path / "a")
    second = trained_tokenizer(lambda: pytest.fail("trained again"), SIZE, tmp_path / "a")
    assert first.get_vocab() == second.get_vocab() == tokenizer.get_vocab()


def test_two_runs_may_train_it_at_once(tokenizer, tmp_path):
    both = threading.Barrier(2, timeout=60)

    def texts():
        both.wait()  # both have found no folder and are training
        return TEXTS

    with ThreadPoolExecutor(2) as pool:
        trained = list(pool.map(lambda _: trained_tokenizer(texts, SIZE, tmp_path / "a"), range(2)))
    assert [t.get_vocab() for t in trained] == [tokenizer.get_vocab()] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_training_leaves_nothing_behind(tmp_path):
    def texts():
        yield TEXTS[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        trained_tokenizer(texts, SIZE, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
