"""The mask token: which row of the embedding it is, and what that row starts from."""

from __future__ import annotations

from typing import Any

from dlm_lightning.layouts import Diffusion


def row(key: str, token: int | str, tokenizer: Any, rows: int) -> int:
    """The embedding row of a token by its id or text; ValueError, naming `model.<key>`, if there is none."""
    vocabulary = tokenizer.get_vocab()
    if isinstance(token, str) and token not in vocabulary:
        raise ValueError(f"model.{key}: the tokenizer has no token {token!r}")
    found = vocabulary[token] if isinstance(token, str) else token
    if not 0 <= found < rows:
        raise ValueError(f"model.{key}: id {found} is outside the vocabulary of {rows} rows")
    return found


def free_row(tokenizer: Any) -> int:
    """The first row after the tokenizer's tokens, which a source may have or not."""
    return 1 + max(tokenizer.get_vocab().values())


def named_row(wanted: int | str | None, trained: Diffusion | None, tokenizer: Any, rows: int) -> int:
    """The row of a mask token that is named, or stated by a diffusion source; ValueError if these are two, or none."""
    stated = trained.mask_id if trained else None
    if wanted is None and stated is None:
        raise ValueError("model.mask_token must be named: the source does not state the one that it was trained with")
    found = row("mask_token", stated if wanted is None else wanted, tokenizer, rows)  # type: ignore[arg-type]
    if stated not in (None, found):
        raise ValueError(f"model.mask_token: id {found}, but the source was trained with {stated}")
    return found


def start(init: int | str | None, mask_id: int, tokenizer: Any, rows: int) -> tuple[int, int | str] | None:
    """The mask token's row and what it starts from (see `source.build`), or None where nothing is asked for."""
    if init is None:
        return None
    return mask_id, init if init in ("mean", "random") else row("mask_init", init, tokenizer, rows)
