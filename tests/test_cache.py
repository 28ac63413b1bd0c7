"""The cache: what a forward shows replaces what was there, and everything that is visible is looked at."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.cache import Cache
from dlm_lightning.view import Pattern, View

MASK = 300
PATTERN = Pattern(3, "clean")


def part(view: View, columns: list[list[int]]) -> View:
    """Columns of a view, others in each row."""
    index_BS = torch.tensor(columns)
    return View(*(tensor_BL.gather(1, index_BS) for tensor_BL in view.coordinates))


@pytest.fixture
def shown(make_denoiser):
    """`shown(shift)`: a denoiser and two documents of 9 tokens whose last block is masked, as one view."""

    def make(shift: str = "none"):
        denoiser = make_denoiser(shift=shift, pattern=PATTERN)
        ids_BL = torch.randint(0, 299, (2, 9))
        ids_BL[:, 6:] = MASK
        position_BL = torch.arange(9).expand_as(ids_BL)
        return denoiser, PATTERN.continuation(ids_BL, position_BL, torch.full((2, 1), 6))

    return make


@pytest.mark.parametrize("shift", ["none", "next_token"])
@pytest.mark.parametrize(
    "steps",
    [
        [[[0, 1, 2], [0, 1, 2]], [[3, 4, 5, 6, 7, 8]] * 2],
        [[[0, 1, 2, 2], [0, 1, 2, 2]], [[3, 4, 5, 6, 7, 8]] * 2],  # a token twice
        [[[0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2]], [[6, 7, 8, 8, 8, 8], [3, 4, 5, 6, 7, 8]]],  # rows of their own
        [[[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 2, [[6, 7, 8]] * 2],  # and again, in their place
    ],
    ids=["runs", "twice", "ragged", "again"],
)
def test_logits_are_those_of_a_forward_that_shows_everything(shown, shift, steps):
    denoiser, view = shown(shift)
    masks_N = (view.ids_BS == MASK).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        expected_NV = denoiser(view, masks_N)[:, :300]
        cache = Cache(9)
        for columns in steps[:-1]:
            denoiser(part(view, columns), masks_N[:0], cache=cache)
        logits_NV = denoiser(part(view, steps[-1]), masks_N, cache=cache)[:, :300]
    assert (logits_NV - expected_NV).abs().max() <= 1e-5 * expected_NV.abs().max()


def test_what_is_not_shown_again_is_as_old_as_it_is(shown):
    """Keys and values of a block that was shown as masks, looked at by a token that is shown alone."""
    denoiser, view = shown()
    other = View(view.ids_BS.masked_fill(view.ids_BS == MASK, 7), *view.coordinates[1:])
    last_N = torch.tensor([8])
    with torch.no_grad():
        stale, fresh = Cache(9), Cache(9)
        denoiser(view, last_N, cache=stale)
        denoiser(other, last_N, cache=fresh)
        one, two = (denoiser(part(view, [[8], [8]]), last_N, cache=cache)[:, :300] for cache in (stale, fresh))
        assert torch.allclose(one, denoiser(view, last_N)[:, :300], atol=1e-4)
    assert not torch.allclose(one, two, atol=1e-2)


def test_what_was_never_shown_is_read_at_the_token_before(shown, plain_logits):
    denoiser, view = shown()
    with torch.no_grad():
        logits_NV = denoiser(view[:, :6], torch.tensor([6, 15]), cache=Cache(9))[:, :300]
    mask_SS = (
        torch.ones(6, 6, dtype=torch.bool).tril(2).logical_and(torch.arange(6) // 3 <= torch.arange(6)[:, None] // 3)
    )
    for row in range(2):
        expected_SV = plain_logits(
            denoiser,
            view.ids_BS[row, :6],
            torch.arange(6),
            mask_SS | (torch.arange(6) // 3 == torch.arange(6)[:, None] // 3),
        )
        assert torch.allclose(logits_NV[row], expected_SV[5, :300], atol=1e-4)


def test_rows_that_are_selected_keep_what_they_have(shown):
    denoiser, view = shown("next_token")
    with torch.no_grad():
        expected_NV = denoiser(view, torch.tensor([15, 16]))[:, :300]
        cache = Cache(9)
        denoiser(view[:, :6], torch.tensor([], dtype=torch.long), cache=cache)
        before = cache.nbytes
        cache.select(torch.tensor([1]))
        assert cache.nbytes == before // 2
        logits_NV = denoiser(view[1:, 6:], torch.tensor([6, 7]), cache=cache)[:, :300]
    assert (logits_NV - expected_NV).abs().max() <= 1e-5 * expected_NV.abs().max()


def test_memory_is_keys_values_hidden_states_and_coordinates(shown):
    denoiser, view = shown()
    cache = Cache(20)
    with torch.no_grad():
        denoiser(view, torch.tensor([8]), cache=cache)
    config = denoiser.network.config
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert cache.nbytes == 2 * 20 * (keys_and_values + config.hidden_size * 4 + 6 * 8)
