"""What one process holds of a parameter: all of it, or its rows of one that FSDP2 has sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(parameter: Tensor) -> tuple[Tensor, int]:
    """This process's part, which shares the parameter's memory, and the place of its first row in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), offset[0]


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter; all ranks call it together."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
