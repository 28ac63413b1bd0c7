"""Tensors on their way between host and device, for which neither waits."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from host to GPU it travels while the host goes on."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory, the copy would wait for all that the GPU has yet to do
    return tensor.to(device, non_blocking=device.type == "cuda")


class Fetched:
    """A tensor's numbers on their way to the host. The tensor must not change any more."""

    def __init__(self, tensor: Tensor) -> None:
        self._here = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The tensor on the host; waits until it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._here
