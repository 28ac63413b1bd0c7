"""A device's peak by its name."""

from __future__ import annotations

import pytest
import torch

from dlm_lightning.peak_flops import peak_flops


@pytest.mark.filterwarnings("ignore:FLOPs not found")
@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "bf16-true", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756e12),
        ("NVIDIA H200 NVL", "bf16-mixed", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),  # Lightning's
        ("a GPU of tomorrow", "bf16-mixed", None),
    ],
)
def test_a_peak_is_that_of_products_without_sparsity(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None
