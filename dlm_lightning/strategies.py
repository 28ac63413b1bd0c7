"""Strategies beyond Lightning's own: FSDP2, with each rank reading only its shard of the source."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from dlm_lightning import lora
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.source import Source


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

    def shard(self, denoiser: Denoiser, source: Source | None) -> None:
        """Shard each module that transformers never splits (a decoder layer), then the rest; fill them from the source.

        With a source the parameters are on the meta device; without one they are real, and equal on all ranks.
        """
        mesh, network = self.device_mesh["data_parallel"], denoiser.network
        for layer in layers(network):
            fully_shard(layer, mesh=mesh)
        fully_shard(denoiser, mesh=mesh)
        if source is not None:
            network.to_empty(device=self.root_device)
            fill(network, source)


def layers(network: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers keeps on one device, by class name: the decoder layers."""
    found = [module for module in network.modules() if type(module).__name__ in (network._no_split_modules or ())]
    if not found:
        raise ValueError(f"trainer.strategy: fsdp2 cannot shard {network.config.model_type}, which names no layers")
    return found


@torch.no_grad()
def fill(network: PreTrainedModel, source: Source) -> None:
    """Copy each local shard from the source; rows that it lacks (an added mask token) hold the mean of its rows.

    Buffers that are in no file (rotary frequencies) are computed anew, and tied weights are tied again.
    """
    for module in network.modules():
        if dict(module.named_buffers(recurse=False)):
            network._init_weights(module)
    network.tie_weights()
    for name, parameter in lora.named_parameters(network):
        local: Tensor = parameter
        start = 0
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            local, start = parameter.to_local(), offset[0]
        known = max(0, min(source.rows(name) - start, len(local)))
        local[:known] = source.read(name, start, start + known)
        if known < len(local):
            local[known:] = source.read(name).float().mean(0)


StrategyRegistry.register("fsdp2", FSDP2, description="fully sharded data parallelism (FSDP2)")
