"""The probe tells networks that attend as their views say from those that do not."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning import attention, lora
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.sight import check_readout, check_sight, probe_view
from dlm_lightning.source import Source, build, build_config
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, attention_mask, sees

PATTERNS = [Pattern(None), Pattern(16), Pattern(16, "clean"), Pattern(16, "clean", "causal"), AUTOREGRESSIVE]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")
by_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.block_size}-{p.context}-{p.context_rank}")


@by_pattern
def test_every_family_attends_as_its_view_says(family, pattern, make_denoiser):
    denoiser = make_denoiser(family)
    assert check_sight(denoiser, pattern) == probe_view(pattern, 300, [1, 2]).ids_BS.numel() ** 2


def test_every_family_is_read_as_transformers_reads_it(family, make_denoiser):
    assert check_readout(make_denoiser(family, shift="next_token")) < 1e-5
    assert check_readout(make_denoiser(family)) < 1e-5  # a clear token is read from the one before, whatever the shift


@pytest.mark.parametrize(
    ("family", "keys"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.0625})]
)
def test_what_a_family_does_to_its_logits_is_done(family, keys, source_folder):
    config = Source(str(source_folder())).config.to_dict() | keys
    config = build_config({key: config[key] for key in (*SIZES, *keys)} | {"model_type": family})
    assert check_readout(Denoiser(build(config, None, attention.NAME), 299, range(299))) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pattern", PATTERNS[:-1], ids=str)  # transformers isolates causal documents by itself
def test_a_network_that_ignores_the_view_is_refused(implementation, pattern, source_folder):
    """It is causal over the whole row, as a language model of transformers is by itself."""
    source = Source(str(source_folder()))
    denoiser = Denoiser(build(source.config, source, implementation), 299, range(299))
    with pytest.raises(
        ValueError, match=r"qwen3 does not attend as its view says: in layer 1 the token at position \d+ of copy"
    ):
        check_sight(denoiser, pattern)


def leaky(q, k):
    """Also sees one token of the other document."""
    return sees(q, k) | ((q.document_BS == 1) & (k.document_BS == 0) & (k.position_BS == 2) & (q.position_BS == 5))


def blind(q, k):
    """Does not see one token that it should."""
    return sees(q, k) & ~((q.position_BS == 2) & (k.position_BS == 1))


@pytest.mark.parametrize(
    ("does", "says"), [(leaky, "moves with .* does not see"), (blind, "does not move with .* sees")]
)
def test_a_single_pair_is_enough(does, says, make_denoiser, monkeypatch):
    denoiser = make_denoiser()
    plan = attention.plan
    monkeypatch.setattr(attention, "plan", lambda view, _, *rest: plan(view, does, *rest))
    with pytest.raises(ValueError, match=says):
        check_sight(denoiser, Pattern(2))
    monkeypatch.undo()
    check_sight(denoiser, Pattern(2))


def test_a_predicate_of_ones_own_is_held_to_itself(make_denoiser):
    denoiser = make_denoiser(predicate=leaky)
    check_sight(denoiser, Pattern(2))
    check_readout(denoiser)  # of the network, whatever the recipe shows it
    assert denoiser.predicate is leaky


@pytest.mark.parametrize("how", ["bfloat16", "adapters", "activation checkpointing"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3"])
def test_however_the_network_is_trained(how, family, source_folder):
    source = Source(str(source_folder(family)))
    network = build(source.config, source, attention.NAME, dtype=torch.bfloat16 if how == "bfloat16" else torch.float32)
    if how == "adapters":
        lora.adapt(network, lora.Lora(rank=2))
        lora.start(network)
    elif how == "activation checkpointing":
        network.gradient_checkpointing_enable({"use_reentrant": False})
    denoiser = Denoiser(network, 299, range(299))
    assert denoiser.training
    for pattern in PATTERNS:
        check_sight(denoiser, pattern)
    check_readout(denoiser)


def test_logits_that_are_scaled_out_of_sight_are_noticed(make_denoiser):
    denoiser = make_denoiser()
    forward = denoiser.network.forward

    def scaled(*args, **options):
        output = forward(*args, **options)
        output.logits = output.logits / 2
        return output

    denoiser.network.forward = scaled
    with pytest.raises(
        ValueError, match=r"qwen3 does more to its logits than is done here .*: they differ by 1.0e\+00"
    ):
        check_readout(denoiser)


def test_rounding_by_the_place_in_a_batch_moves_nothing(make_denoiser):
    """Kernels may round the rows of a batch differently; wide and deep networks make much of it."""
    denoiser = make_denoiser()

    def rounded(_module, _args, output):
        return output * (1 + 1e-3 * torch.arange(len(output))[:, None, None])

    denoiser.network.get_input_embeddings().register_forward_hook(rounded)
    for pattern in PATTERNS:
        check_sight(denoiser, pattern)


def test_the_row_has_blocks_ragged_ends_and_two_documents():
    view = probe_view(Pattern(64, "clean"), 300, list(range(100)))
    copies = view.copy_BS[0].unique().tolist()
    assert copies == [0, 1, 2] and view.document_BS[0].unique().tolist() == [0, 1]
    assert view.rank_BS[0].unique().tolist() == [0, 4, 8]
    seen = attention_mask(view)[0].float().mean()
    assert 0 < seen < 0.5


def test_training_goes_on_as_if_it_had_not_been_looked_at(make_denoiser):
    denoiser = make_denoiser()
    before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    check_sight(denoiser, Pattern(4, "clean"))
    check_readout(denoiser)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert denoiser.network.config._attn_implementation == attention.NAME
    assert not denoiser.network.base_model._forward_hooks
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in denoiser.state_dict().items())
