"""Packing against a token-by-token reference, and the guarantees that training rests on."""

import sys
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_lightning.data.rows import Document, Row, Tally, blank, pack

PAD = 99


@st.composite
def document(draw):
    ids = draw(st.lists(st.integers(0, 98), max_size=12))
    return Document(ids, [draw(st.booleans()) for _ in ids])


documents = st.lists(document(), max_size=8)
lengths = st.integers(1, 8)
limits = st.integers(1, 12) | st.just(sys.maxsize)  # positions of a model


def scorable(document, length):
    """Whether anything of a document that is cut at `length` can be scored: its first token never is."""
    return any(document.maskable[1:length])


def reference(documents, length, split, together, limit):
    """Rows as lists of (id, position, document, maskable) of their real tokens, built token by token."""
    rows = [[]]
    if split:  # what is longer than the positions is several documents
        documents = [
            Document(ids[first : first + limit], maskable[first : first + limit])
            for ids, maskable in documents
            for first in range(0, len(ids), min(limit, 99))
        ]
    most = min(length, limit)
    for number, (ids, maskable) in enumerate(documents):
        if not split and not scorable(documents[number], most):
            continue
        if not together or (not split and len(rows[-1]) + min(len(ids), most) > length):
            rows.append([])
        for position, token in enumerate(ids if split else ids[:most]):
            if len(rows[-1]) == length:
                rows.append([])
            rows[-1].append((token, position, number, maskable[position]))
    numbered = []
    for row in filter(None, rows):
        here = list(dict.fromkeys(number for _, _, number, _ in row))
        first = {number: next(i for i, token in enumerate(row) if token[2] == number) for number in here}
        numbered.append([(t, p, here.index(n), m and i != first[n]) for i, (t, p, n, m) in enumerate(row)])
    return numbered


def real(row: Row):
    """The tokens of a row that are no padding, as (id, position, document, maskable)."""
    columns = zip(*(column.tolist() for column in row), strict=True)
    return [token for token in columns if token[2] >= 0]


@given(documents, lengths, st.booleans(), st.booleans(), limits)
def test_equals_the_reference(documents, length, split, together, limit):
    rows = [real(row) for row in pack(documents, length, PAD, split, together, limit)]
    assert rows == reference(documents, length, split, together, limit)
    assert all(position < limit for row in rows for _, position, *_ in row)


@given(documents, lengths, st.booleans(), st.booleans(), limits)
def test_the_tally_is_what_happened_to_the_documents(documents, length, split, together, limit):
    tally, most = Tally(), min(length, limit)
    rows = list(pack(documents, length, PAD, split, together, limit, tally))
    kept = [document for document in documents if split or scorable(document, most)]
    assert sorted(tally.lengths.elements()) == sorted(len(document.ids) for document in documents)
    assert tally.tokens == sum(len(real(row)) for row in rows)
    assert tally.dropped == len(documents) - len(kept)
    assert tally.truncated == sum(not split and len(document.ids) > most for document in kept)
    assert tally.longer == sum(len(document.ids) > limit for document in documents)


@given(documents, lengths, st.booleans(), limits)
def test_apart_no_row_holds_two_documents(documents, length, split, limit):
    rows = [real(row) for row in pack(documents, length, PAD, split, together=False, positions=limit)]
    assert all({number for _, _, number, _ in row} == {0} for row in rows)


def test_a_tally_survives_its_file_and_adds_up(tmp_path):
    documents = [Document(range(n), [True] * n) for n in (1, 3, 3, 9)]
    tally = Tally()
    list(pack(documents, 4, PAD, split=False, positions=2, tally=tally))
    assert tally == Tally(Counter({1: 1, 3: 2, 9: 1}), tokens=6, truncated=3, dropped=1, longer=3)
    tally.write(tmp_path / "tally.json")
    assert Tally.read(tmp_path / "tally.json") == tally and len(list(tmp_path.iterdir())) == 1
    assert tally + tally == Tally(Counter({1: 2, 3: 4, 9: 2}), tokens=12, truncated=6, dropped=2, longer=6)


@given(documents, lengths)
def test_split_holds_every_token_once_in_order_and_pads_only_the_last_row(documents, length):
    rows = list(pack(documents, length, PAD, split=True))
    tokens = [token for row in rows for token, *_ in real(row)]
    assert tokens == [token for document in documents for token in document.ids]
    assert all(len(real(row)) == length for row in rows[:-1])


@given(documents, lengths)
def test_unsplit_never_splits_cuts_only_what_is_longer_than_a_row_and_drops_what_has_nothing_to_mask(documents, length):
    rows = list(pack(documents, length, PAD, split=False))
    pieces = [
        [token for token, *_ in piece] for row in rows for _, piece in groupby(real(row), key=lambda token: token[2])
    ]
    assert pieces == [document.ids[:length] for document in documents if scorable(document, length)]


@given(documents, lengths, st.booleans())
def test_padding_is_at_the_end_unmaskable_and_of_documents_of_its_own(documents, length, split):
    for row in pack(documents, length, PAD, split):
        padding = row.document < 0
        assert np.all(np.diff(padding.astype(int)) >= 0)
        assert len(set(row.document[padding])) == padding.sum()
        assert np.all(row.ids[padding] == PAD)
        assert not row.maskable[padding].any()


@given(documents, lengths, st.booleans())
def test_rows_keep_their_shape_and_types(documents, length, split):
    for row in pack(documents, length, PAD, split):
        assert [column.shape for column in row] == [(length,)] * 4
        assert [column.dtype for column in row] == [np.int32, np.int32, np.int32, bool]


def test_a_document_over_three_rows_counts_on_and_its_prompt_stays_unmaskable():
    documents = [Document([7], [True]), Document(range(8), [False] * 5 + [True] * 3)]
    first, second, third = pack(documents, 4, PAD, split=True)
    assert first.position.tolist() == [0, 0, 1, 2] and first.document.tolist() == [0, 1, 1, 1]
    assert second.position.tolist() == [3, 4, 5, 6] and second.document.tolist() == [0] * 4
    assert third.position.tolist() == [7, 0, 0, 0] and third.document[0] == 0
    assert [row.maskable.tolist() for row in (first, second, third)] == [
        [False] * 4,
        [False, False, True, True],
        [False] * 4,  # nothing in its row predicts the only token
    ]


def test_a_document_beyond_the_positions_goes_on_as_a_new_one_or_is_cut():
    [document] = documents = [Document(range(8), [False] * 2 + [True] * 6)]
    tally = Tally()
    first, second = pack(documents, 5, PAD, split=True, positions=3, tally=tally)
    assert first.position.tolist() == [0, 1, 2, 0, 1] and first.document.tolist() == [0, 0, 0, 1, 1]
    assert second.position.tolist()[:3] == [2, 0, 1] and second.document.tolist()[:3] == [0, 1, 1]
    assert first.maskable.tolist() == [False, False, True, False, True]  # a document's first token never is
    assert second.maskable.tolist() == [False, False, True, False, False]
    assert (tally.longer, tally.truncated) == (1, 0)
    tally = Tally()
    [row] = pack(documents, 5, PAD, split=False, positions=3, tally=tally)
    assert row.ids.tolist() == [*document.ids[:3], PAD, PAD] and (tally.longer, tally.truncated) == (1, 1)


def test_rows_do_not_share_memory():
    first, second = pack([Document([1, 2, 3, 4], [True] * 4)], 2, PAD, split=True)
    assert first.ids.tolist() == [1, 2] and second.ids.tolist() == [3, 4]


def test_a_prompt_that_fills_the_row_leaves_its_document_out():
    documents = [Document(range(6), [False] * n + [True] * (6 - n)) for n in (3, 4, 5)]
    tally = Tally()
    [row] = pack(documents, 4, PAD, split=False, tally=tally)
    assert row.ids.tolist() == [0, 1, 2, 3] and row.maskable.tolist() == [False] * 3 + [True]
    assert (tally.truncated, tally.dropped) == (1, 2)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("documents", [[], [Document([], [])]])
def test_no_tokens_make_no_rows(documents, split):
    assert list(pack(documents, 4, PAD, split)) == []


def test_a_blank_row_is_all_padding():
    row = blank(3, PAD)
    assert real(row) == [] and row.ids.tolist() == [PAD] * 3 and len(set(row.document)) == 3
    assert not row.maskable.any()
