"""Representation drift from the AR source, and the geometry of hidden states."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from dlm_lightning import attention
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.loss import score
from dlm_lightning.module import Recipe
from dlm_lightning.representation import Geometry, layer_states, spread
from dlm_lightning.source import build, decoder_layers
from dlm_lightning.view import AUTOREGRESSIVE, Batch, predictors

STREAMS = ("clean", "masked")


class Representation(L.Callback):
    """Compares hidden states with the source's at each validation, token by token, in several layers.

    representation/<stream>/<metric>/<layer>, layers counted from 1, where a stream is:
    clean: clear text read causally, as the source reads it.
    masked: the states that masked tokens are predicted from, under the pattern's own NELBO noise, beside the state
        that the source predicts the same token from.

    The metrics are cka, linear, 1 for the same up to rotation and scale; rankme and alpha_req, of the model's states;
    source_rankme and source_alpha_req, of the source's, clean stream only (see `representation`).

    It builds the source a second time, whole on every device, at the first validation. A recipe without a source is
    not measured.

    Args:
        layers: in how many layers, evenly spread; always in the last one.
    """

    def __init__(self, layers: int = 4) -> None:
        if layers < 1:
            raise ValueError(f"Representation.layers must be at least 1, not {layers}")
        self.layers = layers
        self._source: Denoiser | None = None
        self._metrics: dict[str, dict[int, Geometry]] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, recipe: Recipe) -> None:
        self._metrics = {}
        if recipe.source is None:
            return
        if self._source is None:
            dtype = next(recipe.denoiser.parameters()).dtype
            network = build(recipe.source.config, recipe.source, attention.NAME, dtype=dtype, trusted=recipe.trusted)
            ids = recipe.tokenizer.get_vocab().values()
            known = [token for token in ids if token < network.config.vocab_size]
            self._source = Denoiser(network, recipe.mask_id, known[:1], "next_token").to(recipe.device).eval()
        numbers = spread(len(decoder_layers(recipe.denoiser.network)), self.layers)
        width = recipe.denoiser.network.config.hidden_size, self._source.network.config.hidden_size
        streams = STREAMS[:1] if recipe.pattern == AUTOREGRESSIVE else STREAMS
        self._metrics = {
            stream: {number: Geometry(*width).to(recipe.device) for number in numbers}
            for stream in (*streams, "source")
        }

    def on_validation_batch_end(self, trainer: L.Trainer, recipe: Recipe, _: Any, batch: Batch, *__: Any) -> None:
        if not self._metrics:
            return
        assert self._source is not None
        nothing_N = batch.ids_BL.new_empty(0)
        clean = AUTOREGRESSIVE.lay_out(batch, [], recipe.mask_id)
        before_N = batch.maskable_BL.flatten().nonzero().squeeze(1) - 1  # the first token of a document is never scored
        numbers = list(self._metrics["clean"])
        with layer_states(self._source.network, numbers) as theirs:
            self._source(clean, nothing_N)
        with layer_states(recipe.denoiser.network, numbers) as ours:
            recipe.denoiser(clean, nothing_N)
        for number in numbers:
            of_source_ND = theirs[number].flatten(0, 1)[before_N]
            self._metrics["clean"][number].update(ours[number].flatten(0, 1)[before_N], of_source_ND)
            self._metrics["source"][number].update(of_source_ND, of_source_ND)
        if "masked" not in self._metrics:
            return
        copies = recipe.nelbo_masks(batch)
        view = recipe.pattern.lay_out(batch, [mask_BL for mask_BL, _ in copies], recipe.mask_id)
        scored, S, L = score(batch, view, copies), view.ids_BS.shape[1], batch.ids_BL.shape[1]
        read_BS = predictors(view, recipe.mask_id, recipe.shift, recipe.first_token)
        row_N, column_N = scored.index_N // S, scored.index_N % S
        with layer_states(recipe.denoiser.network, numbers) as ours:
            recipe.denoiser(view, nothing_N)
        for number in numbers:
            of_masked_ND = ours[number].flatten(0, 1)[row_N * S + read_BS.flatten()[scored.index_N]]
            self._metrics["masked"][number].update(
                of_masked_ND, theirs[number].flatten(0, 1)[row_N * L + column_N % L - 1]
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, recipe: Recipe) -> None:
        for stream, of_layers in self._metrics.items():
            for number, metric in of_layers.items():
                for name, value in metric.compute().items():
                    if name == "alpha_req_r2" or not torch.isfinite(value):
                        continue
                    if stream != "source":
                        recipe.log(f"representation/{stream}/{name}/{number + 1}", value.float())
                    elif name != "cka":
                        recipe.log(f"representation/clean/source_{name}/{number + 1}", value.float())
