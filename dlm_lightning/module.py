"""The LightningModule that all recipes share. A recipe decides what the model is shown; everything else is here.

Shapes: B rows, L tokens per copy, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from dlm_lightning import attention, nonfinite, readout, shards
from dlm_lightning.checkpoint import FACTS, agree, rewind
from dlm_lightning.compilation import compile_layers
from dlm_lightning.conversion import Conversion
from dlm_lightning.loss import Scored, score, weighted_sum
from dlm_lightning.noise import NELBO, Masked, Noise, turned
from dlm_lightning.nonfinite import Numbers
from dlm_lightning.optimizer import LrScale, adamw, check_rates
from dlm_lightning.sight import check_readout, check_sight
from dlm_lightning.tally import Tally, count, norms, over_ranks
from dlm_lightning.view import AUTOREGRESSIVE, Batch, Pattern, View, groups

log = logging.getLogger(__name__)


class Recipe(Conversion):
    """Trains a network by one attention pattern. A recipe of one's own passes its pattern, and may override `corrupt`,
    `train_pattern` and `predicate`.

    Args:
        pattern: the attention pattern of the finished model: validation and decoding use it.
        noise: which tokens are masked and what they weigh.
        views: how many times a step draws the noise of each row; the loss is the mean over these views, which share one
            clean copy.
        ar_weight: weight of an autoregressive loss on a clean copy, beside the diffusion loss.
        lr: peak learning rate of AdamW.
        min_lr_ratio: final learning rate of the cosine schedule, as a share of `lr`.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        lr_scale: factors of `lr` for the mask token's row and for the embedding.
        nonfinite: what to do with a step whose loss or gradient is not finite, which changes neither weights nor
            optimizer: `stop` the run before the next one is made, or `skip` it, and the schedule goes on.
        **options: see `Conversion`.
    """

    tally: Tally  # of the last optimizer step
    maskings: ClassVar[tuple[str, ...]] = ("bernoulli", "exact", "exact_round", "tilted")
    mirrored: ClassVar[bool] = True  # views come in pairs, see `noise.turned`

    def __init__(
        self,
        pattern: Pattern,
        noise: Noise = NELBO,
        views: int = 1,
        ar_weight: float = 0.0,
        lr: float = 1e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        lr_scale: LrScale = LrScale(),
        nonfinite: nonfinite.Answer = "stop",
        **options: Any,
    ) -> None:
        super().__init__(pattern, **options)
        if noise.masking not in self.maskings:
            raise ValueError(
                f"noise.masking: {noise.masking} does not go with {type(self).__name__}, "
                f"which takes {' or '.join(self.maskings)}"
            )
        if views < 1:
            raise ValueError(f"model.views must be at least 1, not {views}")
        if views > 1 and pattern.context != "clean":
            raise ValueError(
                f"model.views: {views} needs a clean copy that the views share, as with model.context: clean; "
                f"{type(self).__name__} has none here, so model.views must be 1"
            )
        if ar_weight < 0:
            raise ValueError(f"model.ar_weight must be at least 0, not {ar_weight}")
        if ar_weight and pattern.context == "clean" and pattern.context_rank == "block":
            raise ValueError("model.ar_weight above 0 needs model.context_rank: causal; a block would see its answer")
        check_rates(lr, betas, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio, weight_decay=weight_decay)
        self.noise, self.views, self.ar_weight = noise, views, ar_weight
        self.lr, self.min_lr_ratio, self.warmup_steps = lr, min_lr_ratio, warmup_steps
        self.weight_decay, self.betas, self.lr_scale = weight_decay, betas, lr_scale
        self.nonfinite = nonfinite
        self.metrics: Any = torch.nn.ModuleDict({name: MeanMetric() for name in ("nelbo", "masked_ce", "ar_nll")})
        self._tally: Any = None  # of the micro-batches so far
        self._given: Numbers | None = None  # by the last step
        self._looked_at: dict[str, float] = {}  # of the step before

    # What a recipe decides

    @property
    def train_pattern(self) -> Pattern:
        """The pattern of the current step; differs from `pattern` only where a recipe anneals it."""
        return self.pattern

    @property
    def phases(self) -> dict[str, int]:
        """Optimizer steps that what changes at the beginning of a run lasts, by its key."""
        return {"model.warmup_steps": self.warmup_steps}

    def corrupt(self, batch: Batch, pattern: Pattern) -> list[Masked]:
        """The masks of one view of a batch, one per noisy copy, with the weight of each masked token.

        Randomness comes from the batch's uniforms alone.
        """
        return [self.draw(self.noise, batch, pattern)]

    def nelbo_masks(self, batch: Batch) -> list[Masked]:
        """The masks of the NELBO: uniform, k = ceil(t·L'), weight L'/k in each block, whatever the recipe trains by."""
        return [self.draw(NELBO, batch, self.pattern)]

    # The step

    def noisy(self, batch: Batch, pattern: Pattern) -> list[Masked]:
        """The noisy copies of a training step: those of each view, weighted so that the loss is a mean over views."""
        copies: list[Masked] = []
        for view in range(self.views):
            u_BL, t_BL = turned(batch.u_BL, batch.t_BL, view, self.views, self.mirrored)
            copies += self.corrupt(batch._replace(u_BL=u_BL, t_BL=t_BL), pattern)
        return [Masked(mask_BL, weight_BL / self.views) for mask_BL, weight_BL in copies]

    def shown(self, batch: Batch, pattern: Pattern) -> tuple[list[Masked], View, Scored]:
        """What a step shows of a batch: the mask of each noisy copy, their view, and its scored tokens."""
        copies = self.noisy(batch, pattern)
        view = self.show(batch, copies, pattern)
        return copies, view, score(batch, view, copies, self.ar_weight)

    def show(self, batch: Batch, copies: Sequence[Masked], pattern: Pattern) -> View:
        """The view of a batch under one mask per noisy copy."""
        masks = [mask_BL for mask_BL, _ in copies]
        return pattern.lay_out(batch, masks, self.mask_id, with_ar_copy=self.ar_weight > 0)

    @property
    def copies(self) -> int:
        """How often a step shows each token of a row to the network: noisy and clean copies."""
        return self._smallest_view().ids_BS.shape[1]

    def _smallest_view(self) -> View:
        """What a step shows of a row of one token."""
        token_11 = torch.zeros(1, 1, dtype=torch.long)
        half_11 = torch.full((1, 1), 0.5)
        row = Batch(token_11, token_11, token_11, token_11.bool(), half_11, half_11, token_11[0])
        return self.show(row, self.noisy(row, self.pattern), self.pattern)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leave a batch that is trained on where it is, on the host: how many of its tokens are scored is known there.

        From a GPU that would have to be asked, and everything would wait for the answer.
        """
        return batch if self.trainer.training else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        # 1. the batch brings raw uniforms, a pure function of (seed, sample, epoch, view)
        # 2. the recipe turns them into a view: what is masked, and who sees whom
        pattern = self.train_pattern
        copies, view, scored = self.shown(batch, pattern)
        # 3. −log p [N] at the positions that are scored, and their weighted sum; from here on, on the device
        loss, nll_N = self.denoiser(view.to(self.device), *scored.to(self.device))
        # 4. a sum; `on_before_optimizer_step` divides by the count over ranks and micro-batches, so the division that
        #    Lightning and the strategy are about to make is undone at the end
        # 5. what is logged: a vector that is added up over micro-batches here, over ranks before the optimizer step
        noise_block = pattern.block_size if self.noise.t_per == "block" else None
        counted = count(batch, view, copies, scored, nll_N, noise_block)
        self._tally = counted if self._tally is None else self._tally + counted
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide gradients and loss by the number of maskable tokens of this step, over ranks and micro-batches.

        Logs `train/loss` per maskable token, `train/grad_norm` before clipping, `train/masked_ce/<share>` of `Tally`.
        Numbers stay on the device; those of the step before have come to the host by now, and go to the progress bar.
        """
        self.settle()
        if self._looked_at:
            self.log("loss", torch.tensor(self._looked_at["train/loss"]), prog_bar=True, logger=False)
        counted, self._tally = self._tally, None
        self.tally = Tally.read(over_ranks(counted))
        tokens = self.tally.maskable.clamp(min=1)
        network = self.denoiser.network
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        torch._foreach_div_([shards.local(gradient)[0] for gradient in gradients.values()], tokens)
        norms_P = norms([*gradients.values()])
        numbers = {"train/loss": self.tally.loss / tokens, "train/grad_norm": norms_P.norm()}
        for name, number in numbers.items():
            self.log(name, number)
        for share, mean in self.tally.masked_ce.items():
            self.log(f"train/masked_ce/{share}", mean)
        nonfinite.leave_out(optimizer, torch.stack([*numbers.values()]))
        of_gradients = dict(zip(gradients, norms_P.unbind(), strict=True))
        self._given = Numbers(self.trainer.global_step + 1, numbers, of_gradients)

    def settle(self) -> None:
        """Look at the numbers of the last step, unless that was done; see `nonfinite.look`."""
        given, self._given = self._given, None
        if given:
            self._looked_at = nonfinite.look(self, given, self.nonfinite)

    def on_fit_start(self) -> None:
        """Refuse a network that does not do what its views say (see `sight`); say what the run is too short for."""
        if self.backend != "auto":
            with self.trainer.precision_plugin.forward_context():
                view = self._smallest_view().to(self.device)
                attention.require(self.backend, view, self.predicate, self.denoiser.network.dtype)
        readout.require(self.head, self.denoiser.network, self.device)
        check_sight(self.denoiser, self.pattern)
        if not any(isinstance(parameter, DTensor) for parameter in self.denoiser.parameters()):
            check_readout(self.denoiser)
        if self.compiled:
            compile_layers(self.denoiser.network, self.device)
        for key, steps in self.phases.items():
            if steps > self.trainer.max_steps:
                log.info("note: %s lasts %d steps, the whole run %d", key, steps, self.trainer.max_steps)

    def on_train_batch_end(self, *_: Any) -> None:
        """Have Lightning validate the last step, whatever `trainer.val_check_interval` is."""
        if self.trainer.global_step >= self.trainer.max_steps:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        self.settle()

    def on_validation_epoch_start(self) -> None:
        self.settle()
        for metric in self.metrics.values():
            metric.reset()

    def validation_step(self, batch: Batch, _: int) -> None:
        """Adds to `val/nelbo` (nats per token), `val/masked_ce` (unweighted) and `val/ar_nll` (next token, causal)."""
        copies = self.nelbo_masks(batch)
        tokens = batch.maskable_BL.sum()
        if copies:
            view = self.pattern.lay_out(batch, [mask_BL for mask_BL, _ in copies], self.mask_id)
            scored = score(batch, view, copies)
            nll_N = self.denoiser(view, scored.index_N, scored.target_N)
            self._mean("nelbo", weighted_sum(nll_N, scored.weight_N), tokens)
            self._mean("masked_ce", nll_N.sum(), torch.tensor(len(nll_N), device=nll_N.device))
        view = AUTOREGRESSIVE.lay_out(batch, [], self.mask_id)
        scored = score(batch, view, [], ar_weight=1.0)
        nll_N = self.denoiser(view, scored.index_N, scored.target_N)
        self._mean("ar_nll", nll_N.sum(), tokens)
        if not copies:  # an autoregressive model's likelihood is exact
            self._mean("nelbo", nll_N.sum(), tokens)

    def _mean(self, name: str, total: Tensor, count: Tensor) -> None:
        self.metrics[name].update(total / count.clamp(min=1), weight=count)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.metrics.items():
            if metric.update_called:
                self.log(f"val/{name}", metric.compute(), prog_bar=name == "nelbo")

    def draw(self, noise: Noise, batch: Batch, pattern: Pattern) -> Masked:
        """One mask by a noise: groups are the pattern's blocks and the documents of each row."""
        block_BL = groups(batch.position_BL, batch.document_BL, pattern.block_size)
        document_BL = groups(batch.position_BL, batch.document_BL, None)
        return noise.draw(batch.u_BL, batch.t_BL, batch.maskable_BL, block_BL, document_BL)

    # The optimizer

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule over `trainer.max_steps`."""
        optimizer = adamw(self.denoiser, self.lr, self.lr_scale, self.weight_decay, self.betas)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, self.warmup_steps, self.trainer.max_steps, min_lr_rate=self.min_lr_ratio
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Checkpoints

    def reading(self) -> dict[str, Any]:
        """The facts by which weights are read, in decoding too."""
        pattern = self.pattern
        return {
            "model.block_size": pattern.block_size,
            "model.context": pattern.context,
            "model.context_rank": pattern.context_rank,
            "model.shift": self.shift,
            "model.mask_id": self.mask_id,
        }

    def facts(self) -> dict[str, Any]:
        """What a checkpoint states about itself: a continued run must agree with it."""
        options = ("first_token", "views", "ar_weight", "lr", "min_lr_ratio", "warmup_steps", "weight_decay", "betas")
        return {
            "recipe": f"{type(self).__module__}.{type(self).__qualname__}",
            "model.source": self.source.fingerprint() if self.source else None,
            **self.reading(),
            **{f"model.{name}": getattr(self, name) for name in options},
            **{f"model.noise.{name}": value for name, value in asdict(self.noise).items()},
            **{f"model.lr_scale.{name}": value for name, value in asdict(self.lr_scale).items()},
            "model.lora": asdict(self.lora) if self.lora else None,
            "model.freeze": self.frozen,
            "trainer.max_steps": self.trainer.max_steps,
            **self.trainer.datamodule.facts(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.settle()
        checkpoint[FACTS] = self.facts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe, source, batch …, naming the difference; or go on where it stood.

        To be measured only, its weights must be read as they were trained.
        """
        if FACTS not in checkpoint:
            raise ValueError("this checkpoint was not written by dlm_lightning")
        training = self.trainer.state.fn == "fit"
        agree(checkpoint[FACTS], self.facts() if training else self.reading())
        if training and checkpoint["global_step"] >= self.trainer.max_steps:
            raise ValueError(f"the checkpoint is finished: it has made all of its {checkpoint['global_step']} steps")
        rewind(checkpoint, self.trainer.accumulate_grad_batches)
