"""What the data is, in words: sizes, lengths, and a sample, so that wrong data is seen before it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from dlm_lightning.data.rows import Tally

OPEN, CLOSE = "⟦", "⟧"
RUN, SAMPLE = 120, 480  # characters: of a stretch that is or is not maskable, and of all that is shown


def size(tally: Tally, rows: int, row_length: int) -> str:
    """Documents, tokens and rows, and how full the rows are."""
    return (
        f"{tally.lengths.total():,} documents, {tally.tokens:,} tokens in {rows:,} rows of {row_length}, "
        f"{tally.tokens / (rows * row_length):.1%} full"
    )


def vocabulary(counts_V: np.ndarray, tokens: int) -> str:
    """How much of the vocabulary occurs."""
    occur = int((counts_V > 0).sum())
    return f"{occur:,} of {tokens:,} tokens of the vocabulary occur ({occur / tokens:.1%})"


def lengths(tally: Tally, positions: int) -> str:
    """How long documents are, and how many of them are not whole."""
    documents = tally.lengths.total()
    median, most = (quantile(tally.lengths, share) for share in (0.5, 0.95))
    longer = f"; {tally.longer:,} are longer than the model's {positions:,} positions" if tally.longer else ""
    return (
        f"lengths in tokens: median {median:,}, 95th percentile {most:,}, longest {max(tally.lengths):,}; "
        f"{tally.truncated / documents:.1%} of the documents are cut at a row's end, "
        f"{tally.dropped / documents:.1%} left out with nothing to mask{longer}"
    )


def quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the documents do not exceed."""
    values = sorted(lengths)
    reached = np.cumsum([lengths[value] for value in values])
    return values[int(np.searchsorted(reached, share * reached[-1]))]


def marked(row: Mapping[str, Any], tokenizer: Any) -> str:
    """A row's text in one line, its maskable stretches in brackets, long ones shortened in their middle."""
    real = row["document"] >= 0
    tokens = zip(row["ids"][real].tolist(), row["maskable"][real].tolist(), strict=True)
    text = ""
    for maskable, run in groupby(tokens, key=lambda token: token[1]):
        if len(text) > SAMPLE:
            return f"{text} …"
        words = tokenizer.decode([token for token, _ in run]).replace("\n", "⏎")
        if len(words) > RUN:
            words = f"{words[: RUN // 2]} … {words[-RUN // 2 :]}"
        text += f"{OPEN}{words}{CLOSE}" if maskable else words
    return text
