"""When a row ends: no forward is spent on what comes after it, and nothing before it is missing."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.decode.canvas import Canvas
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import Nothing, exact
from dlm_lightning.decode.selector import LeftToRight, Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.view import Pattern

MASK = 300
PROMPTS = [[17, 250, 3, 99, 41, 8], [5], [17, 250, 3, 99]]
PATTERNS = {"clean": Pattern(4, "clean"), "noisy": Pattern(4, "noisy"), "full": Pattern(None)}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def canvas(rows: list[list[int]], prompt: int) -> Canvas:
    """Rows of one length that begin with `prompt` tokens."""
    state = Canvas([row[:prompt] for row in rows], len(rows[0]) - prompt, 4, None, MASK, False, torch.device("cpu"))
    state.commit(state.masked_BL, torch.tensor(rows))
    return state


def test_a_row_ends_when_everything_up_to_the_first_end_of_text_is_filled_in():
    rows = [
        [9, 1, 9, 2, MASK],  # at 3 tokens
        [9, 1, 2, MASK, MASK],  # not yet
        [9, 1, MASK, 9, 9],  # not yet
        [9, 1, 2, 3, 4],  # full
        [9, 1, 2, 3, 9],
        [9, 9, 1, 1, 1],
    ]
    state = canvas(rows, 1)
    assert Stopper(4).ends(state, [9], None) == [3, None, None, 5, 5, 2]
    assert Stopper(4).ends(state, [2, 9], None) == [3, 3, None, 3, 3, 2]
    assert Stopper(4, eos=False).ends(state, [9], None) == [None, None, None, 5, 5, 5]


def letters(ids: list[int]) -> str:
    return "".join("abcdefghi"[token] for token in ids)


def test_a_row_ends_with_the_token_that_completes_a_stop_string():
    rows = [[1, 0, 1, 2, 3], [1, 2, 3, MASK, MASK], [1, MASK, 2, 3, MASK], [2, 3, 4, 2, 3], [2, 3, 4, 5, 6]]
    ends = Stopper(4, strings=("cd", "ab")).ends(canvas(rows, 1), [], letters)
    assert ends == [3, 3, None, 5, 5]  # ab, cd, not yet, cd (which does not begin in the prompt), full
    assert Stopper(4, strings=("cd",)).ends(canvas([[1, 2, 8, 2, 3]], 1), [8], letters) == [
        3
    ]  # end of text comes first


def test_text_is_cut_at_the_first_stop_string():
    stopper = Stopper(strings=("cd", "bcx"))
    assert [stopper.cut(text) for text in ("abcde", "abcx", "abc", "")] == ["ab", "a", "abc", ""]


@by_pattern
@pytest.mark.parametrize("shift", ["none", "next_token"])
def test_decoding_ends_there_and_spends_no_more_forwards(make_denoiser, pattern, shift):
    denoiser = make_denoiser(shift=shift, pattern=pattern)
    how = Plan(selector=LeftToRight(), cache=exact(denoiser), stopper=Stopper(12, eos=False))
    free = decode(denoiser, PROMPTS, how).rows
    eos_ids = [free[0].new_ids[3], free[1].new_ids[5], free[2].new_ids[7]]  # of a config each, and given
    denoiser.network.config.eos_token_id, denoiser.network.generation_config.eos_token_id = eos_ids[0], eos_ids[1:2]
    how = Plan(selector=LeftToRight(), cache=exact(denoiser), stopper=Stopper(12))
    stopped = decode(denoiser, PROMPTS, how, eos_ids=eos_ids[2:]).rows
    for row, whole in zip(stopped, free, strict=True):
        found = [i for i, token in enumerate(whole.new_ids) if token in eos_ids]
        assert row.new_ids == whole.new_ids[: found[0] + 1 if found else None]
        assert row.forwards == len(row.new_ids)
    assert len(stopped[0].new_ids) <= 4


@by_pattern
def test_stop_strings_end_a_row(make_denoiser, pattern):
    denoiser = make_denoiser(pattern=pattern)

    def text(ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    free = decode(denoiser, PROMPTS, Plan(selector=LeftToRight(), cache=Nothing(), stopper=Stopper(9, eos=False))).rows
    stopper = Stopper(9, eos=False, strings=(text(free[0].new_ids[2:4]),))
    how = Plan(selector=LeftToRight(), cache=Nothing(), stopper=stopper)
    row = decode(denoiser, PROMPTS, how, text=text).rows[0]
    assert (row.new_ids, row.forwards) == (free[0].new_ids[:4], 4)
    assert stopper.cut(text(row.new_ids)) == text(free[0].new_ids[:2])
    with pytest.raises(ValueError, match="stop strings need the tokenizer"):
        decode(denoiser, PROMPTS, how)


def test_end_of_text_waits_until_enough_is_filled_in(make_denoiser):
    denoiser = make_denoiser(pattern=PATTERNS["full"])
    plain = Plan(selector=Threshold(1.0), cache=Nothing(), stopper=Stopper(8))
    denoiser.network.config.eos_token_id = list(range(150))  # every other token, about
    assert any(len(row.new_ids) < 8 for row in decode(denoiser, PROMPTS, plain).rows)
    seen: list[tuple[int, int]] = []

    def watch(state: Canvas) -> None:
        new_BL = state.span(state.prompt_B, state.end_B)
        filled_BL = new_BL & ~state.masked_BL
        ends_BL = filled_BL & torch.isin(state.ids_BL, torch.arange(150))
        seen.extend(zip(filled_BL.sum(1).tolist(), ends_BL.sum(1).tolist(), strict=True))

    decode(
        denoiser,
        PROMPTS,
        Plan(selector=Threshold(1.0), cache=Nothing(), stopper=Stopper(8, eos_after=0.5)),
        watch=watch,
    )
    assert all(ends == 0 for filled, ends in seen if filled <= 4) and any(ends for _, ends in seen)


def test_values_out_of_range_are_refused():
    for wrong in ({"new_tokens": -1}, {"eos_after": 1.1}, {"eos_after": -0.1}, {"strings": ("a", "")}):
        with pytest.raises(ValueError, match=r"must"):
            Stopper(**wrong)
