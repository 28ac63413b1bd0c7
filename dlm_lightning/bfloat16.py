"""Whether a device computes in bfloat16, or only imitates it many times slower than it computes in float32."""

from __future__ import annotations

import torch


def in_hardware(device: torch.device) -> bool:
    """False for CPUs without instructions for it."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
