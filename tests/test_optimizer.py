"""The optimizer: what is frozen stays, and the mask token's row moves as if it were a parameter of its own."""

from __future__ import annotations

import copy

import pytest
import torch

from dlm_lightning import lora
from dlm_lightning.lora import Lora
from dlm_lightning.noise import NELBO
from dlm_lightning.optimizer import LrScale, RowAdamW, adamw, freeze
from dlm_lightning.view import Pattern, groups

PATTERN = Pattern(block_size=4, context="clean")
LR, DECAY, BETAS = 1e-2, 0.3, (0.9, 0.95)
TIES = pytest.mark.parametrize("tied", [True, False])


def train(denoiser, optimizer, make_batch, steps=4, first=0):
    """Steps with the gradients of a diffusion loss, of another batch each."""
    for step in range(first, first + steps):
        batch = make_batch([[9, 7]], seed=step)
        spans = [groups(batch.position_BL, batch.document_BL, size) for size in (4, None)]
        masked = NELBO.draw(batch.u_BL, batch.t_BL, batch.maskable_BL, *spans)
        masks = [masked.mask_BL]
        view = PATTERN.lay_out(batch, masks, denoiser.mask_id)
        index_N = torch.cat([masked.mask_BL, torch.zeros_like(masked.mask_BL)], 1).flatten().nonzero().squeeze(1)
        optimizer.zero_grad()
        denoiser(view, index_N, batch.ids_BL[masked.mask_BL]).sum().backward()
        optimizer.step()


class Rows(torch.nn.Module):
    """A matrix whose row is a parameter of its own."""

    def __init__(self, matrix_RD, row):
        super().__init__()
        self.rest = torch.nn.Parameter(torch.cat([matrix_RD[:row], matrix_RD[row + 1 :]]))
        self.own = torch.nn.Parameter(matrix_RD[row : row + 1].clone())
        self.row = row

    def forward(self):
        return torch.cat([self.rest[: self.row], self.own, self.rest[self.row :]])


@pytest.mark.parametrize("row", [0, 3, 6])
@pytest.mark.parametrize(
    "scale", [LrScale(5.0), LrScale(0.0), LrScale(0.5, 2.0), LrScale(3.0, 0.25), LrScale(4.0, 0.0)]
)
def test_a_row_moves_as_a_parameter_of_its_own(scale, row):
    """Against plain AdamW with two groups, over steps whose gradients depend on what has moved, in double precision."""
    matrix_RD, target_RD = torch.randn(2, 7, 5, dtype=torch.float64)
    reference = Rows(matrix_RD, row)
    decay = DECAY if scale.embedding else 0.0
    plain = torch.optim.AdamW(
        [
            {"params": [reference.rest], "lr": LR * scale.embedding},
            {"params": [reference.own], "lr": LR * scale.mask_row},
        ],
        betas=BETAS,
        weight_decay=decay,
    )
    weight = torch.nn.Parameter(matrix_RD.clone())
    rate, ratio = (scale.embedding, scale.mask_row / scale.embedding) if scale.embedding else (scale.mask_row, None)
    mine = RowAdamW([weight], weight, row, ratio, lr=LR * rate, betas=BETAS, weight_decay=decay)
    for _ in range(20):
        for optimizer, value in ((plain, reference()), (mine, weight)):
            optimizer.zero_grad()
            (value - target_RD).pow(4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(weight.detach(), reference().detach(), rtol=1e-12, atol=1e-12)
    assert (weight[row] - matrix_RD[row]).abs().max() > 0 or scale.mask_row == 0
    still = torch.ones(7, dtype=torch.bool)
    still[row] = False
    if scale.embedding == 0:
        assert torch.equal(weight[still], matrix_RD[still])


def test_the_closure_makes_the_gradients_of_the_step():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = RowAdamW([weight], weight, 1, None, lr=LR, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    assert weight[:, 0].tolist() == pytest.approx([1, 1 - LR, 1])


@TIES
@pytest.mark.parametrize("scale", [LrScale(), LrScale(7.0), LrScale(0.5, 0.5), LrScale(2.0, 0.0), LrScale(0.0, 0.0)])
def test_the_first_step_of_a_network_goes_by_its_scales(make_denoiser, make_batch, tied, scale):
    """At the first step the gradients are the same, so each row's move is its factor times that of plain AdamW."""
    plain, denoiser = make_denoiser("qwen3", tied), make_denoiser("qwen3", tied)
    before = copy.deepcopy(plain.network.state_dict())
    train(plain, adamw(plain, LR, LrScale(), 0.0, BETAS), make_batch, 1)
    train(denoiser, adamw(denoiser, LR, scale, 0.0, BETAS), make_batch, 1)
    plain, mine = plain.network.state_dict(), denoiser.network.state_dict()
    assert (plain["model.embed_tokens.weight"][300] != before["model.embed_tokens.weight"][300]).any()
    for name, start in before.items():
        expected = plain[name].clone()
        if name == "model.embed_tokens.weight" or (tied and name == "lm_head.weight"):
            factors_R1 = torch.full((301, 1), scale.embedding)
            factors_R1[300] = scale.mask_row
            expected = start + factors_R1 * (expected - start)
        torch.testing.assert_close(mine[name], expected, rtol=1e-6, atol=1e-7, msg=name)


def test_equal_scales_need_no_optimizer_of_ones_own(make_denoiser):
    for scale in (LrScale(), LrScale(0.5, 0.5)):
        assert type(adamw(make_denoiser(), LR, scale, 0.0, BETAS)) is torch.optim.AdamW


@pytest.mark.parametrize("scale", [LrScale(3.0), LrScale(3.0, 0.0)])
def test_a_restored_state_goes_on_bitwise(make_denoiser, make_batch, scale):
    whole = make_denoiser("qwen3", True)
    optimizer = adamw(whole, LR, scale, DECAY, BETAS)
    train(whole, optimizer, make_batch, 3)
    cut = make_denoiser("qwen3", True)
    cut.load_state_dict(whole.state_dict())
    again = adamw(cut, LR, scale, DECAY, BETAS)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(next(iter(again.state.values()))) == {"step", "exp_avg", "exp_avg_sq"}
    train(whole, optimizer, make_batch, 2, first=3)
    train(cut, again, make_batch, 2, first=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name


@pytest.mark.parametrize("name", ["mask_row", "embedding"])
def test_a_negative_scale_is_refused(name):
    with pytest.raises(ValueError, match=rf"model.lr_scale.{name} must be at least 0, not -1"):
        LrScale(**{name: -1.0})


# What is frozen


@TIES
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("patterns", [["model.layers.0.*"], ["*norm*", "*embed_tokens*"], ["*.q_proj.*"]])
def test_frozen_parameters_have_no_gradient_and_no_state_and_stay(make_denoiser, make_batch, tied, adapters, patterns):
    denoiser = make_denoiser("qwen3", tied)
    network = denoiser.network
    names = set(dict(network.named_parameters()))
    if adapters:
        lora.adapt(network, Lora(rank=2))
        lora.start(network)
    freeze(network, patterns)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    marks = (
        ("model.layers.0.",)
        if "layers" in patterns[0]
        else ("norm", "embed_tokens")
        if len(patterns) == 2
        else (".q_proj.",)
    )
    frozen = {name for name in names if any(mark in name for mark in marks)}
    assert {lora.plain(n) for n, p in network.named_parameters() if not p.requires_grad} >= frozen
    optimizer = adamw(denoiser, LR, LrScale(), DECAY, BETAS)
    train(denoiser, optimizer, make_batch, 3)
    assert len(optimizer.state) == sum(p.requires_grad for p in network.parameters())
    for name, parameter in network.named_parameters():
        still = lora.plain(name) in frozen or ".base_layer." in name
        assert torch.equal(parameter, before[name]) == still, name
        assert (parameter.grad is None) == still, name


def test_a_tied_head_is_frozen_by_either_name(make_denoiser):
    for pattern in ("lm_head.*", "*embed_tokens*"):
        network = make_denoiser("qwen3", True).network
        freeze(network, [pattern])
        assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_a_pattern_that_matches_nothing_is_refused_by_name(make_denoiser):
    with pytest.raises(ValueError, match=r"^model.freeze: model.layers.7.\* matches no parameter"):
        freeze(make_denoiser().network, ["*norm*", "model.layers.7.*"])


def test_to_freeze_everything_is_refused(make_denoiser):
    with pytest.raises(ValueError, match=r"^model.freeze: model\.\* lm_head\.\* leaves nothing to train"):
        freeze(make_denoiser().network, ["model.*", "lm_head.*"])


def test_scales_of_a_frozen_embedding_are_refused(make_denoiser):
    denoiser = make_denoiser()
    freeze(denoiser.network, ["*embed_tokens*"])
    with pytest.raises(ValueError, match=r"^model.lr_scale has nothing to act on"):
        adamw(denoiser, LR, LrScale(2.0), 0.0, BETAS)
