"""The arms share everything but the way to the loss."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning import bfloat16
from dlm_lightning.bench.arms import AR, OURS, Step, arms, check, packed
from dlm_lightning.bench.needs import forward_tokens, needed_flops, peak_memory
from dlm_lightning.flops import needed
from dlm_lightning.plan import plan, prepare
from dlm_lightning.view import attention_mask

B, L = 4, 24


@pytest.fixture
def step(small, tmp_path, monkeypatch):
    """`step(recipe, *words, documents=1)`: a step of a shipped recipe on the tiny source."""
    monkeypatch.chdir(tmp_path)
    return lambda recipe, *words, documents=1: Step(prepare(recipe, [*small(), *words], here=True), documents)


def test_arms_are_ours_the_baselines_and_ar():
    assert [arm.name for arm in arms(["fair", "peers", "fair"])] == ["ours", "fair", "peers", "ar"]
    with pytest.raises(ValueError, match="there is no baseline peer, only peers and fair; did you mean peers"):
        arms(["peer"])


def test_rows_are_full_of_documents_and_random_tokens():
    batch = packed(3, 10, 4, token_ids=[5, 7, 9])
    assert batch.document_BL.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3]] * 3
    assert batch.position_BL.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]] * 3
    assert batch.maskable_BL.equal(batch.position_BL > 0)
    assert set(batch.ids_BL.unique().tolist()) == {5, 7, 9}
    assert all(same.equal(again) for same, again in zip(batch, packed(3, 10, 4, [5, 7, 9]), strict=True))


@pytest.mark.parametrize("documents", [0, 6])
def test_a_document_has_a_token_to_score(documents):
    with pytest.raises(ValueError, match=f"between 1 and half of data.row_length, 5, not {documents}"):
        packed(1, 10, documents, [1])


@pytest.mark.parametrize("recipe", ["block_causal", "complementary_mask", "full_bidirectional"])
@pytest.mark.parametrize("documents", [1, 3])
def test_all_arms_of_a_recipe_give_its_loss(recipe, documents, step):
    step = step(recipe, documents=documents)
    losses = {arm.name: float(step(arm)) for arm in arms(["peers", "fair"])}
    assert losses["peers"] == pytest.approx(losses[OURS], rel=1e-5)
    assert losses["fair"] == pytest.approx(losses[OURS], rel=1e-5)
    assert losses[AR] == pytest.approx(float(step(arms([])[-1])))


def test_the_ar_step_of_ar_source_is_its_own(step):
    step = step("ar_source", "model.config=null", "data.vocab_size=null")
    assert float(step(arms([])[0])) == float(step(arms([])[1]))


def test_a_step_moves_nothing_but_leaves_gradients_and_moments(step):
    step = step("block_causal")
    before = [p.detach().clone() for p in step.recipe.denoiser.parameters()]
    step(arms([])[0])
    parameters = list(step.recipe.denoiser.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(p.grad is not None and step.optimizer.state[p]["exp_avg"].any() for p in parameters)


def test_gradients_are_clipped_as_the_trainer_asks(step):
    def norm(*words):
        made = step("block_causal", *words)
        made(arms([])[0])
        return torch.nn.utils.get_total_norm([p.grad for p in made.recipe.denoiser.parameters()])

    free = float(norm("trainer.gradient_clip_val=null"))
    assert float(norm(f"trainer.gradient_clip_val={free / 10}")) == pytest.approx(free / 10, rel=1e-3)


def test_mixed_precision_reaches_every_arm(step, products, monkeypatch):
    monkeypatch.setattr(bfloat16, "in_hardware", lambda _device: True)
    made = step("complementary_mask", "trainer.precision=bf16-mixed")
    vocabulary = made.recipe.denoiser.network.config.vocab_size
    for arm in arms(["peers", "fair"]):
        with products(vocabulary) as made_by_it:
            made(arm)
        assert {x.dtype for x in made_by_it.found} == {torch.bfloat16}, arm.name


def test_arms_that_differ_are_refused():
    check({OURS: 2.0, "peers": 2.001, AR: 9.0})
    with pytest.raises(ValueError, match=r"the baseline fair gives a loss of 2\.1, and ours is 2"):
        check({OURS: 2.0, "fair": 2.1})
    with pytest.raises(ValueError, match="gives a loss of nan"):
        check({OURS: 2.0, "fair": float("nan")})


# What a step takes


@pytest.mark.parametrize("recipe", ["block_causal", "complementary_mask"])
def test_activations_that_are_computed_anew_are_not_needed(recipe, step):
    made = [step(recipe, f"model.activation_checkpointing={again}") for again in ("false", "true")]
    assert needed_flops(made[0], arms([])[0]) == needed_flops(made[1], arms([])[0])
    assert made[1].recipe.denoiser.training


@pytest.mark.parametrize(("recipe", "copies"), [("block_causal", (2, 2, 2, 1)), ("complementary_mask", (3, 4, 4, 1))])
def test_forward_tokens_are_those_that_the_network_is_given(recipe, copies, step):
    step = step(recipe)
    found = [forward_tokens(step, arm) for arm in arms(["peers", "fair"])]
    assert found == [count * B * L for count in copies]
    assert not step.recipe.denoiser.network.base_model._forward_pre_hooks


def test_peak_memory_counts_what_is_there_and_what_a_step_makes(step):
    step = step("block_causal", "data.row_length=64")
    found = {}
    for arm in arms(["peers", "fair"]):
        step(arm)
        found[arm.name] = peak_memory(step, arm)
    kept = 16 * sum(p.numel() for p in step.recipe.denoiser.parameters())  # weights, gradients, two moments
    scored = len(arms([])[0].shown(step.recipe, step.batch)[1].index_N)
    logits = 4 * (B * 128 - scored) * 301  # of tokens that are not scored
    assert kept < found[AR] < found[OURS] < found["peers"]
    assert found["peers"] > found["fair"] + logits


def test_peak_memory_counts_what_nobody_is_shown(step):
    """A block of 64 MiB that is given back before the loss is there."""
    step, size = step("block_causal"), 2**26
    ours = arms([])[0]

    def loss(recipe, batch):
        torch.empty(size, dtype=torch.uint8)
        return ours.loss(recipe, batch)

    step(ours)
    parameters = 12 * sum(p.numel() for p in step.recipe.denoiser.parameters())  # weights and moments are there by then
    assert size + parameters <= peak_memory(step, ours._replace(loss=loss)) < size + peak_memory(step, ours)


def test_peak_memory_is_what_a_plan_says(step, small):
    made = step("complementary_mask", "data.row_length=64")
    arm = arms([])[0]
    made(arm)
    planned = plan("complementary_mask", [*small(), "data.row_length=64"]).rehearsal
    alive = planned.weights + planned.optimizer + max(sum(planned.passes), sum(planned.update))
    assert peak_memory(made, arm) == pytest.approx(alive, rel=0.02)


def test_peak_memory_is_the_same_when_it_is_measured_again(step):
    step = step("block_causal")
    arm = arms([])[0]
    step(arm)
    assert peak_memory(step, arm) == peak_memory(step, arm)


def test_flops_are_those_of_the_matrices_and_of_the_pairs_that_see_each_other(step):
    step = step("block_causal", documents=2)
    ours = arms([])[0]
    view, scored = ours.shown(step.recipe, step.batch)
    seen = int(attention_mask(view).sum())
    network = step.recipe.denoiser.network
    matrices = sum(p.numel() for name, p in network.named_parameters() if "layers" in name and p.ndim > 1)
    last = sum(p.numel() for p in network.model.layers[-1].mlp.parameters())  # of it, only what is read is needed
    unread = view.ids_BS.numel() - len(scored.index_N)
    products = 2 * view.ids_BS.numel() * matrices - 2 * unread * last + 2 * len(scored.index_N) * 32 * 301
    attention = 2 * 2 * seen * 4 * 8 * 2  # two products, four heads of eight numbers, two layers
    assert needed_flops(step, ours) == needed(products + attention, network)


def test_compiled_layers_are_ours_alone_and_outlast_what_counts_operations(step, graphs):
    """A baseline's layers stay as they are; what looks at operations must not leave ours uncompiled for good."""
    made = step("complementary_mask", "model.compile=true")
    ours, peers, fair, ar = arms(["peers", "fair"])
    for arm in (peers, fair):
        made(arm)
        peak_memory(made, arm)
        needed_flops(made, arm)
    assert not graphs
    before = needed_flops(made, ours), float(made(ours))
    found = len(graphs)
    assert found
    made(ar)
    assert len(graphs) > found  # of a view of another shape
    assert (needed_flops(made, ours), float(made(ours))) == before
