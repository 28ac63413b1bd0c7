"""FLOPs per second that a device makes at most, of which MFU is a share."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from dlm_lightning.precision import full_name


def peak_flops(device: torch.device, precision: Any) -> float | None:
    """FLOPs per second that a device makes at most in a precision, without sparsity; None where nobody knows.

    Hopper GPUs' in half precision are NVIDIA's datasheets': Lightning (2.6.6) has them with sparsity, if at all.
    """
    half = full_name(precision) != "32-true"
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    if half and ("h100" in name or "h200" in name):
        return 835e12 if "nvl" in name else 756e12 if "pcie" in name else 989.4e12
    return get_available_flops(device, torch.bfloat16 if half else torch.float32)
