"""LoRA through peft: small trained matrices beside frozen ones. To everyone else the network looks as if it had none.

Shapes: R rows and C columns of a weight, K the adapter's rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dlm_lightning import shards

_ADAPTER = "default"  # peft's own name
_INSERTED = re.compile(rf"\.(base_layer|lora_[AB]\.{_ADAPTER})\b")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): W + alpha/rank · B·A with W frozen, A random and B zero at first.

    The adapted layers' own weights and biases are frozen; embeddings, norms and head are trained as they are. There is
    no dropout: it would differ after a resume.

    Args:
        rank: rows of A and columns of B.
        alpha: the update is scaled by alpha/rank.
        targets: `all-linear` for every linear layer but the head, or patterns of their names such as `"*.q_proj"`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Literal["all-linear"] | list[str] = "all-linear"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"model.lora.rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"model.lora.alpha must be above 0, not {self.alpha}")
        if not self.targets:
            raise ValueError("model.lora.targets: give at least one pattern, or all-linear")


class Update(NamedTuple):
    """What an adapter adds to a weight: scaling · left · right."""

    left_RK: Tensor
    right_KC: Tensor
    scaling: float

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the sum's second term, float32."""
        return self.scaling * (self.left_RK[start:stop].float() @ self.right_KC.float())


def adapt(network: PreTrainedModel, lora: Lora) -> None:
    """Put adapters into the network, which keeps its class; their values are `start`'s. ImportError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # an extra
    except ImportError as error:
        raise ImportError("model.lora needs peft: pip install 'dlm_lightning[lora]'") from error
    targets = _targets(network, lora.targets)
    transposed = any(isinstance(network.get_submodule(name), Conv1D) for name in targets)
    sizes: Any = {"r": lora.rank, "lora_alpha": lora.alpha}  # peft declares int, and takes any number
    config = LoraConfig(**sizes, target_modules=targets, fan_in_fan_out=transposed, init_lora_weights=False)
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".base_layer." not in name)


def _targets(network: PreTrainedModel, targets: Literal["all-linear"] | list[str]) -> list[str]:
    head = network.get_output_embeddings()
    linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    patterns = ["*"] if targets == "all-linear" else targets
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(
                f"model.lora.targets: {pattern} matches no linear layer; they have names like {linear[0]}, "
                "and the head is none of them"
            )
    return [name for name in linear if any(fnmatchcase(name, pattern) for pattern in patterns)]


@torch.no_grad()
def start(network: nn.Module) -> None:
    """Give each adapter its first values, the same under every strategy: A by torch's seed and its name, B zero."""
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            continue
        values_KC = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            seed = hashlib.sha256(f"{torch.initial_seed()} {name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(seed))
            nn.init.kaiming_uniform_(values_KC, a=math.sqrt(5), generator=generator)
        part, first = shards.local(parameter)
        part.copy_(values_KC[first : first + len(part)])


def plain(name: str) -> str:
    """A parameter's name in a network without adapters; an adapter's is that of the weight it is added to."""
    return _INSERTED.sub("", name)


def named_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the network without its adapters, by their plain names."""
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            yield plain(name), parameter


def update(network: nn.Module, name: str) -> Update | None:
    """What is added to the weight of a plain name, or None; all ranks call it together, for it gathers A and B."""
    path, _, kind = name.rpartition(".")
    layer: Any = network.get_submodule(path)
    if kind != "weight" or not hasattr(layer, "base_layer"):
        return None
    A_KC, B_RK = (shards.whole(getattr(layer, f"lora_{matrix}")[_ADAPTER].weight.detach()) for matrix in "AB")
    factors = (A_KC.T, B_RK.T) if isinstance(layer.base_layer, Conv1D) else (B_RK, A_KC)
    return Update(*factors, layer.scaling[_ADAPTER])


@torch.no_grad()
def merged(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict of the network (empty on all ranks but one) as that of a network without adapters.

    All ranks call it together.
    """
    plain_weights = {plain(name): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, _ in named_parameters(network):
        if (added := update(network, name)) and plain_weights:
            weight_RC = plain_weights[name]
            sum_RC = weight_RC.float() + added.rows(0, len(weight_RC)).to(weight_RC.device)
            plain_weights[name] = sum_RC.to(weight_RC.dtype)
    return plain_weights
