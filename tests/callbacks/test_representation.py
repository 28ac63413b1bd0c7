"""Representation drift: an unconverted source is itself, a trained one is not, and layers are counted from 1."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from dlm_lightning.callbacks.representation import Representation
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal

pytestmark = pytest.mark.filterwarnings("ignore")


def validated(recipe, batch, callback) -> dict[str, float]:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], enable_model_summary=False, **options)
    trainer.validate(recipe, DataLoader([batch], batch_size=None), verbose=False)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {name.removeprefix("representation/"): value for name, value in found.items() if "representation/" in name}


@pytest.fixture
def batch(make_batch):
    return make_batch([[40], [21, 17], [30, 9]], length=40)


def test_an_unconverted_source_is_like_itself(source_folder, batch):
    found = validated(BlockCausal(block_size=4, source=str(source_folder())), batch, Representation())
    for layer in (1, 2):
        assert found[f"clean/cka/{layer}"] == pytest.approx(1, abs=1e-5)
        assert found[f"clean/rankme/{layer}"] == pytest.approx(found[f"clean/source_rankme/{layer}"], rel=1e-5)
        assert found[f"clean/alpha_req/{layer}"] == pytest.approx(found[f"clean/source_alpha_req/{layer}"], rel=1e-4)
        assert 0 < found[f"masked/cka/{layer}"] < 0.9  # it never saw a mask
    assert not [name for name in found if name.startswith("source") or name.endswith("/3")]


def test_a_moved_network_is_less_like_it(source_folder, batch):
    recipe, callback = BlockCausal(block_size=4, source=str(source_folder())), Representation(layers=1)
    before = validated(recipe, batch, callback)
    with torch.no_grad():
        for parameter in recipe.denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    after = validated(recipe, batch, callback)
    assert after["clean/cka/2"] < 0.99 < before["clean/cka/2"]
    assert after["clean/source_rankme/2"] == pytest.approx(before["clean/source_rankme/2"])
    assert "clean/cka/1" not in after


def test_states_of_a_shifted_pattern_are_those_that_predict(source_folder, batch):
    """With blocks of one token a shifted pattern reads each token from the clean state before it, as the source."""
    own = BlockCausal(block_size=1, shift="next_token", source=str(source_folder()))
    found = validated(own, batch, Representation())
    assert found["masked/cka/2"] == pytest.approx(1, abs=1e-5)


def test_an_autoregressive_model_has_no_masked_states_and_a_random_one_is_not_measured(source_folder, batch):
    found = validated(ArSource(source=str(source_folder())), batch, Representation())
    assert found and not [name for name in found if name.startswith("masked")]


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="layers must be at least 1"):
        Representation(layers=0)
