"""What a recipe trains: a pretrained model, or a config, as a Denoiser with its mask token."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import lightning as L
from transformers import PreTrainedModel

from dlm_lightning import attention, layouts, lora, mask_token, precision, readout
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.layouts import Diffusion
from dlm_lightning.lora import Lora
from dlm_lightning.optimizer import freeze
from dlm_lightning.source import Source, build, build_config, stated
from dlm_lightning.view import AUTOREGRESSIVE, Pattern, sees


class Conversion(L.LightningModule):
    """Builds the network of a recipe, which says by its pattern and predicate who sees whom.

    Args:
        pattern: the attention pattern of the finished model: validation and decoding use it.
        source: the AR model to start from: a hub id, a local folder, or a run folder of this project.
        config: without a source, the keys of a transformers config; `model_type` names the architecture.
        pretrained: start from the source's weights; false keeps its config and tokenizer and starts from random ones.
        mask_token: id or text of the token that stands for a masked one; null takes the one that a diffusion source
            states, or else the embedding row after the last token, which is added if there is none.
        mask_init: what the mask token's row starts from: `mean` of all rows, `random` around it, or a token's id or
            text; null leaves a row that the source has, and takes the mean for an added one.
        shift: `next_token` reads a masked token from the hidden state before it, `none` from its own; null takes what a
            diffusion source states, and any other than that is refused.
        first_token: with shift, whether the first token of a block is read from the `clean` context, as in decoding, or
            from the `noisy` previous block.
        trust_remote_code: run the code that the source brings along for a model that transformers does not know.
        lora: train low-rank adapters in place of the layers' own matrices; needs the extra `lora`.
        freeze: patterns of names of parameters that are not trained, such as `"model.layers.0.*"` or `"*norm*"`.
        attention: the backend: `auto` takes the fastest that computes a view; `dense`, `split` on CPUs, `flex` on CUDA,
            `fa4` the same by FlashAttention-4's kernel, `flash` on CUDA for views that are full or causal.
        head: what computes loss and gradient of the head in training: `torch`, or on CUDA `liger`, whose fused kernel
            needs the extra `liger`.
        compile: compile the decoder layers for training, which needs a C++ compiler on CPUs and Triton on GPUs.
        activation_checkpointing: compute each layer's activations anew in the backward pass rather than keep them.
    """

    denoiser: Denoiser
    trainer: Any  # a Trainer whose datamodule is a TokenData
    predicate = staticmethod(sees)

    def __init__(
        self,
        pattern: Pattern,
        source: str | None = None,
        config: dict[str, Any] | None = None,
        pretrained: bool = True,
        mask_token: int | str | None = None,
        mask_init: int | str | None = None,
        shift: Literal["none", "next_token"] | None = "none",
        first_token: Literal["clean", "noisy"] = "clean",
        trust_remote_code: bool = False,
        lora: Lora | None = None,
        freeze: list[str] | None = None,
        attention: attention.Backend = "auto",
        head: readout.Head = "torch",
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (source is None) == (config is None):
            raise ValueError("give one of model.source (a pretrained model) and model.config (to train from scratch)")
        self.pattern = pattern
        self.source_name, self.config_values, self.pretrained = source, config, pretrained
        self.mask_token, self.mask_init, self.first_token = mask_token, mask_init, first_token
        self.trusted = trust_remote_code
        self.shift: str = shift or stated(source, "shift")
        self.backend, self.head, self.compiled = attention, head, compile
        self.lora, self.frozen, self.activation_checkpointing = lora, tuple(freeze or ()), activation_checkpointing

    @cached_property
    def source(self) -> Source | None:
        """The AR source, opened; None for a model that is trained from scratch."""
        return Source(self.source_name, trusted=self.trusted) if self.source_name else None

    @cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer, or else the data module's."""
        return self.source.tokenizer() if self.source else self.trainer.datamodule.tokenizer

    @cached_property
    def model_config(self) -> Any:
        """The network's config, its vocabulary large enough for the tokenizer and the mask token."""
        config = self.source.config if self.source else build_config(self.config_values or {})
        if not self.source:
            config.vocab_size = len(self.tokenizer) + 1
            config.eos_token_id = config.pad_token_id = self.tokenizer.eos_token_id
            config.bos_token_id = None
        elif (tokens := mask_token.free_row(self.tokenizer)) > config.vocab_size:
            raise ValueError(
                f"model.source: the tokenizer of {self.source_name} has {tokens} tokens and its embedding "
                f"{config.vocab_size} rows; they do not belong together"
            )
        if self.mask_token is None and not self._trained:
            config.vocab_size = max(config.vocab_size, self.mask_id + 1)
        return config

    @property
    def diffusion(self) -> Diffusion | None:
        """How this recipe trains its model, for the model's config to state; None for an autoregressive one."""
        if self.pattern == AUTOREGRESSIVE:
            return None
        pattern = self.pattern
        return Diffusion(self.shift, pattern.block_size, self.mask_id, pattern.context, pattern.context_rank)

    @property
    def _trained(self) -> Diffusion | None:
        """How a source that is a diffusion model already was trained."""
        return self.source.diffusion if self.source else None

    @cached_property
    def mask_id(self) -> int:
        """The embedding row of the mask token."""
        if self.mask_token is None and not self._trained:
            return mask_token.free_row(self.tokenizer)
        return mask_token.named_row(self.mask_token, self._trained, self.tokenizer, self.model_config.vocab_size)

    @property
    def mask_row(self) -> tuple[int, int | str] | None:
        """The mask token's row and what it starts from, where `mask_init` says so; see `source.build`."""
        return mask_token.start(self.mask_init, self.mask_id, self.tokenizer, self.model_config.vocab_size)

    def check_shift(self) -> None:
        """Refuse to read a diffusion source by another shift than it was trained with."""
        trained = self._trained if self.pretrained and self.pattern != AUTOREGRESSIVE else None
        if trained and trained.shift not in (None, self.shift):
            raise ValueError(
                f"model.shift: {self.shift} would misread {self.source_name}, which was trained with {trained.shift}; "
                "null takes the source's"
            )

    def configure_model(self) -> None:
        """Build the Denoiser in the trainer's precision, sharded where the strategy shards."""
        strategy = getattr(self._trainer, "strategy", None)
        dtype = precision.settle(strategy)
        if hasattr(self, "denoiser"):
            return
        source = self.source if self.pretrained else None
        self.check_shift()
        shard = getattr(strategy, "shard", None)
        network = build(
            self.model_config,
            source,
            attention.NAME,
            mask_row=self.mask_row,
            meta=bool(shard and source),
            dtype=dtype,
            trusted=self.trusted,
        )
        if self.diffusion:
            setattr(network.config, layouts.KEY, asdict(self.diffusion))
        if self.lora:
            lora.adapt(network, self.lora)
        freeze(network, self.frozen)
        if self.activation_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        denoiser = self.wrap(network)
        if shard:
            shard(denoiser, source, self.mask_row)
        lora.start(network)
        self.denoiser = denoiser

    def wrap(self, network: PreTrainedModel) -> Denoiser:
        """The Denoiser around a network, with the recipe's mask token, shift and predicate."""
        ids = self.tokenizer.get_vocab().values()
        return Denoiser(
            network,
            self.mask_id,
            ids,
            self.shift,
            self.first_token,
            self.predicate,
            self.pattern,
            self.backend,
            self.head,
        )
