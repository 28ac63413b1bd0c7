"""Strategies: DDP that leaves batches on the host, and FSDP2 with each rank reading only its shard of the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from dlm_lightning import checkpoint, lora, shards
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.source import Source, decoder_layers, initial_row


class DDP(DDPStrategy):
    """A whole network on each device, `--trainer.strategy=ddp`, which is given batches as the recipe leaves them.

    With ids of devices, torch would move all that `training_step` is given to the GPU (see `Recipe`, which wants it on
    the host). The network is on its device without them.
    """

    def determine_ddp_device_ids(self) -> list[int] | None:
        return None


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices, `--trainer.strategy=fsdp2`.

    Lightning's own defaults for ModelParallelStrategy are tensor parallelism, so the sizes are set here.

    Args:
        **options: see ModelParallelStrategy.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def shard(self, denoiser: Denoiser, source: Source | None, mask_row: tuple[int, int | str] | None = None) -> None:
        """Shard each module that transformers never splits (a decoder layer), then the rest; fill them from the source.

        With a source the parameters are on the meta device; without one they are real, and equal on all ranks.
        `mask_row` is that of `source.build`.
        """
        mesh, network = self.device_mesh["data_parallel"], denoiser.network
        for layer in decoder_layers(network):
            fully_shard(layer, mesh=mesh)
        fully_shard(denoiser, mesh=mesh)
        if source is not None:
            network.to_empty(device=self.root_device)
            fill(network, source, mask_row)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill each rank's shards from a checkpoint of shards, of however many ranks, or of one file."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a forward pass before training left gathered
        path = Path(self.broadcast(checkpoint_path))
        content, options = checkpoint.load(path), StateDictOptions(full_state_dict=True)
        if path.is_dir():
            return super().load_checkpoint(path, weights_only=True)
        set_model_state_dict(self.model, content.pop("state_dict"), options=options)
        name = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, content.pop("optimizer_states"), strict=False):
            names = [[name[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
            set_optimizer_state_dict(self.model, optimizer, checkpoint.by_name(state, names), options=options)
        return content


@torch.no_grad()
def fill(network: PreTrainedModel, source: Source, mask_row: tuple[int, int | str] | None = None) -> None:
    """Copy each local shard from the source; rows that it lacks (an added mask token) hold the mean of its rows.

    Buffers that are in no file (rotary frequencies) are computed anew, and tied weights are tied again. `mask_row` sets
    one row of embedding and head, as in `source.build`.
    """
    for module in network.modules():
        if dict(module.named_buffers(recurse=False)):
            network._init_weights(module)
    network.tie_weights()
    ends: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
    tables = {id(layer.weight) for layer in ends}
    for name, parameter in lora.named_parameters(network):
        local, start = shards.local(parameter)
        known = max(0, min(source.rows(name) - start, len(local)))
        local[:known] = source.read(name, start, start + known)
        if known < len(local):
            local[known:] = initial_row(source.read(name), "mean")
        if mask_row and id(parameter) in tables and start <= mask_row[0] < start + len(local):
            local[mask_row[0] - start] = initial_row(source.read(name), mask_row[1])


StrategyRegistry.register("ddp", DDP, description="data parallelism (DDP)", override=True, start_method="popen")
StrategyRegistry.register("fsdp2", FSDP2, description="fully sharded data parallelism (FSDP2)")
