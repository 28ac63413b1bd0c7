"""Several views of a row in one step: the mean over steps of their own, each with the right noise."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.noise import NELBO, Noise, turned, uniforms
from dlm_lightning.plan import plan
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional

STEPS = 2**24  # of the grid that uniforms lie on
SHARING = (BlockCausal, ComplementaryMask)


@pytest.fixture
def batch(make_batch):
    """Packed, padded, with a prompt, and with a document that goes on from an earlier row."""
    return make_batch([[9, 7], [13], [5, 5], []], length=16, prompts={(1, 0): 40}, starts={(1, 0): 37})


def of_view(batch, view, views, mirrored=True):
    u_BL, t_BL = turned(batch.u_BL, batch.t_BL, view, views, mirrored)
    return batch._replace(u_BL=u_BL, t_BL=t_BL)


def step(recipe, batch):
    """The loss of a training step, its gradients, and what was counted."""
    recipe.denoiser.zero_grad()
    recipe._tally = None
    loss = recipe.training_step(batch, 0)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in recipe.denoiser.named_parameters()}, recipe._tally


# The noise of a view


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("views", [2, 3, 4, 7])
def test_a_views_uniforms_are_the_samples_own_in_another_order(views, mirrored):
    """As a map of the grid onto itself it leaves a uniform distribution as it is; checked on a stretch and its ends."""
    near = torch.arange(4096)
    steps = torch.cat([near, STEPS // 2 + near, STEPS - 1 - near])
    u, t = (steps / STEPS).float(), ((steps + 1) / STEPS).float()
    assert u.max() < 1 and t.min() > 0 and t.max() == 1
    places = set()
    for view in range(views):
        u_view, t_view = turned(u, t, view, views, mirrored)
        assert u_view.min() >= 0 and u_view.max() < 1 and t_view.min() > 0 and t_view.max() <= 1
        mirror = -1 if mirrored and view % 2 else 1
        for before, after, sign in ((u, u_view, mirror), (t, t_view, 1)):
            before, after = (before.double() * STEPS).long(), (after.double() * STEPS).long()
            assert ((after - sign * before) % STEPS).unique().numel() == 1  # so no two values become one
        places.add(round(float(t_view[0] - t[0]) % 1 * views))
    assert places == set(range(views))


def test_over_the_views_each_t_falls_once_into_each_part():
    _, t_L = uniforms(seed=3, stream=0, place=5, epoch=0, view=0, length=512)
    for views in (2, 3, 4, 5):
        t_VL = torch.stack([turned(t_L, t_L, view, views)[1] for view in range(views)])
        part_VL = (t_VL.double() * views).ceil() - 1
        assert torch.equal(part_VL.sort(dim=0).values, torch.arange(views).double()[:, None].expand_as(part_VL))


@pytest.mark.parametrize("noise", [NELBO, Noise("bernoulli", "inverse_p"), Noise("tilted", "inverse_t")])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_a_mean_over_views_has_the_expectation_of_one_and_less_noise_than_independent_draws(noise, views):
    rows, length = 6000, 16
    generator = torch.Generator().manual_seed(1)
    u_BL = torch.rand(rows, length, generator=generator)
    t_BL = (1 - torch.rand(rows, 1, generator=generator)).expand(rows, length).contiguous()
    group_BL = torch.zeros(rows, length, dtype=torch.long)
    value_L = torch.linspace(0.5, 1.5, length)

    def loss_B(view: int) -> torch.Tensor:
        """A loss that depends on which tokens are masked and on how many."""
        mask_BL, weight_BL = noise.draw(*turned(u_BL, t_BL, view, views), group_BL >= 0, group_BL, group_BL)
        return (value_L * weight_BL * mask_BL.float().mean(1, keepdim=True)).sum(1)

    single_B, mean_B = loss_B(0), torch.stack([loss_B(view) for view in range(views)]).mean(0)
    error = ((single_B.var() + mean_B.var()) / rows).sqrt()
    assert abs(single_B.mean() - mean_B.mean()) < 4 * error
    assert mean_B.var() < 0.8 * single_B.var() / views


# The step


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("shift", ["none", "next_token"])
@pytest.mark.parametrize("recipe_class", SHARING)
def test_a_step_is_the_mean_over_a_step_for_each_view(make_recipe, batch, assert_same, recipe_class, shift, views):
    one, several = (make_recipe(recipe_class, block_size=4, shift=shift, views=k) for k in (1, views))
    steps = [step(one, of_view(batch, view, views, one.mirrored)) for view in range(views)]
    loss, gradients, counted = step(several, batch)
    mean = {name: sum(by_name[name] for _, by_name, _ in steps) / views for name in gradients}
    assert_same((loss, gradients), (sum(loss for loss, *_ in steps) / views, mean))
    # what is counted: terms of all views, and the unweighted cross-entropies of each
    whole = sum(tally for *_, tally in steps)
    assert torch.allclose(counted[0], whole[0] / views, rtol=1e-5)
    assert torch.equal(counted[1:3], whole[1:3] / views)
    assert torch.allclose(counted[[3, *range(5, len(counted))]], whole[[3, *range(5, len(whole))]], rtol=1e-5)
    copies = 2 if recipe_class is ComplementaryMask else 1
    assert counted[4] == batch.ids_BL.numel() * (1 + copies * views)
    assert several.copies == 1 + copies * views


@pytest.mark.parametrize("recipe_class", SHARING)
def test_the_ar_loss_on_the_shared_clean_copy_counts_once(make_recipe, batch, validated, recipe_class):
    plain, with_ar = (
        make_recipe(recipe_class, block_size=4, context_rank="causal", views=3, ar_weight=w) for w in (0.0, 0.3)
    )
    difference = with_ar.training_step(batch, 0).item() - plain.training_step(batch, 0).item()
    assert difference == pytest.approx(
        0.3 * validated(plain, batch)["ar_nll"] * batch.maskable_BL.sum().item(), rel=1e-4
    )


@pytest.mark.parametrize("recipe_class", [*SHARING, FullBidirectional, ArSource])
def test_one_view_is_what_a_recipe_masks_bit_for_bit(make_recipe, batch, recipe_class):
    recipe = make_recipe(recipe_class)
    assert recipe.views == 1
    for mine, own in zip(recipe.noisy(batch, recipe.pattern), recipe.corrupt(batch, recipe.pattern), strict=True):
        assert torch.equal(mine.mask_BL, own.mask_BL) and torch.equal(mine.weight_BL, own.weight_BL)


@pytest.mark.parametrize("recipe_class", SHARING)
def test_a_step_depends_on_nothing_but_its_batch_and_the_first_view_is_the_batchs_own(make_recipe, batch, recipe_class):
    recipe = make_recipe(recipe_class, block_size=4, views=2)
    first, second = step(recipe, batch), step(recipe, batch)
    assert first[0] == second[0] and torch.equal(first[2], second[2])
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())
    own = recipe.corrupt(batch, recipe.pattern)
    for mine, theirs in zip(recipe.noisy(batch, recipe.pattern), own, strict=False):
        assert torch.equal(mine.mask_BL, theirs.mask_BL)
        assert torch.equal(mine.weight_BL, theirs.weight_BL / 2)


@pytest.mark.parametrize("recipe_class", SHARING)
def test_a_validation_does_not_know_of_views(make_recipe, batch, validated, recipe_class):
    one, several = (validated(make_recipe(recipe_class, block_size=4, views=k), batch) for k in (1, 4))
    assert one == several


def test_complementary_pairs_are_not_each_others_mirror_images(make_recipe, make_batch):
    """The mirror image of a pair at the same t is that pair again, with nothing gained."""
    recipe = make_recipe(ComplementaryMask, block_size=16, views=2)
    batch = make_batch([[16]] * 200, length=16)
    first, _, second, _ = (mask_BL.float() * 2 - 1 for mask_BL, _ in recipe.noisy(batch, recipe.pattern))
    alike_B = (first * second)[:, 1:].mean(1)
    assert alike_B.abs().max() < 1
    assert alike_B.square().mean() < 0.1  # two pairs that have nothing to do with each other: about 1/15


def test_a_plan_counts_the_tokens_of_all_views(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, three = (plan("block_causal", small(model__views=k)).tokens for k in (1, 3))
    assert one.forward == 2 * one.data and three.forward == 4 * three.data
    assert three.data == one.data
    assert three.scored == pytest.approx(3 * one.scored, rel=0.05)


# Refusals


@pytest.mark.parametrize(
    "recipe_class, options",
    [(FullBidirectional, {}), (ArSource, {}), (BlockCausal, {"context": "noisy"})],
)
def test_views_without_a_clean_copy_to_share_are_refused(recipe_class, options):
    with pytest.raises(ValueError, match=rf"model\.views: 2 needs .* model\.context: clean; {recipe_class.__name__}"):
        recipe_class(source="anything", views=2, **options)


@pytest.mark.parametrize("views", [0, -1])
def test_less_than_one_view_is_refused(views):
    with pytest.raises(ValueError, match=f"model.views must be at least 1, not {views}"):
        BlockCausal(source="anything", views=views)
