"""FlexAttention on CUDA: torch's compiled kernel under a block mask that is built from bounds, without a dense one.

Shapes: B rows, S tokens of a row, Q tiles of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from dlm_lightning.attention import bounds
from dlm_lightning.view import View, near, sees

SIZE = 128  # tokens of a tile, the kernel's own
LEAST = 16  # numbers of a head that Triton multiplies matrices of
GRAPHS = 64  # beyond its limit torch would go on without a compiled kernel, and look at all pairs


@cache
def kernel() -> Callable[..., Any]:
    """The compiled kernel, one for all plans; a graph for each shape of a view, window and softcap."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class Plan:
    """The block masks of a view [B, S] that looks at itself, for each sliding window that layers ask for."""

    view: View
    predicate: Callable[[View, View], Tensor]
    queries: int = SIZE  # of a tile
    kernel_options: dict[str, Any] | None = None
    masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that layers have asked for; None is without one."""
        return {*self.masks}

    def mask(self, window: int | None = None) -> BlockMask:
        """The block mask of layers with this window."""
        if window not in self.masks:
            self.masks[window] = block_mask(self.view, self.predicate, window, self.queries)
        return self.masks[window]

    @torch.compiler.disable  # in a layer that is compiled: the kernel is compiled by itself
    def attend(
        self,
        q_BHSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        scaling: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of H query heads over G key and value heads: [B, S, H, D]."""
        H, D = q_BHSD.shape[1], q_BHSD.shape[3]
        options: dict[str, Any] = {"score_mod": _capped(softcap), "block_mask": self.mask(window)}
        options |= {"scale": scaling or D**-0.5, "enable_gqa": k_BGSD.shape[1] != H}
        own = v_BGSD.dtype  # under autocast, rotary positions leave queries and keys in float32
        qkv = (_padded(x.to(own)) for x in (q_BHSD, k_BGSD, v_BGSD))
        out_BHSD = kernel()(*qkv, **options, kernel_options=self.kernel_options)
        return out_BHSD[..., : v_BGSD.shape[3]].transpose(1, 2).contiguous()


def _padded(x_BHSD: Tensor) -> Tensor:
    """With zeros behind heads of fewer numbers than the kernel takes, which change no score and no output."""
    D = x_BHSD.shape[3]
    return F.pad(x_BHSD, (0, LEAST - D)) if D < LEAST else x_BHSD


def plan(view: View, predicate: Callable[[View, View], Tensor]) -> Plan | None:
    """The block mask of a view on CUDA; None without CUDA or Triton, or under another predicate than the family's."""
    return Plan(view, predicate) if view.ids_BS.is_cuda and predicate is sees and has_triton() else None


def fa4_plan(view: View, predicate: Callable[[View, View], Tensor], dtype: torch.dtype = torch.float32) -> Plan | None:
    """The block mask for FlashAttention-4's kernel; None where `plan` has none, without that kernel, or in float32.

    `dtype` is the network's.
    """
    half = torch.is_autocast_enabled("cuda") or dtype != torch.float32
    if not half or plan(view, predicate) is None or (queries := fa4_queries()) is None:
        return None
    return Plan(view, predicate, queries, {"BACKEND": "FLASH"})


@cache
def fa4_queries() -> int | None:
    """Queries of a tile of FlashAttention-4's kernel on this GPU; None where torch or flash-attn-4 has none for it."""
    try:
        missing = find_spec("flash_attn.cute") is None
    except ModuleNotFoundError:
        missing = True
    if missing or not torch.cuda.is_available() or torch.__version__ < "2.13":
        return None
    return {9: SIZE, 10: 2 * SIZE}.get(torch.cuda.get_device_capability()[0])


def block_mask(
    view: View, predicate: Callable[[View, View], Tensor], window: int | None = None, queries: int = SIZE
) -> BlockMask:
    """Which tiles of so many queries and SIZE keys the kernel skips, looks at pair by pair, or takes whole."""
    tiles = bounds.tiles(view, SIZE, predicate, window)
    some_BQT, hidden_BQT = (_joined(found, queries // SIZE) for found in (tiles.some_BQT, ~tiles.all_BQT))
    whole_BQT = some_BQT & ~hidden_BQT
    S = view.ids_BS.shape[1]

    def looks(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = view[b, q], view[b, k]
        seen = predicate(query, key)
        return seen if window is None else seen & near(query, key, window)

    return BlockMask.from_kv_blocks(
        *_listed(some_BQT & ~whole_BQT),
        *_listed(whole_BQT),
        BLOCK_SIZE=(queries, SIZE),
        mask_mod=looks,
        seq_lengths=(S, S),
    )


def _joined(found_BQT: Tensor, count: int) -> Tensor:
    """What is found in any of so many neighbouring tiles of queries; of the last there may be fewer."""
    short = -found_BQT.shape[1] % count
    return F.pad(found_BQT, (0, 0, 0, short)).unflatten(1, (-1, count)).any(2)


def _listed(chosen_BQT: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys are chosen for each tile of queries, and which, those first: int32, one head for all."""
    which_BQT = chosen_BQT.int().argsort(dim=2, descending=True, stable=True)
    return chosen_BQT.sum(2, dtype=torch.int32)[:, None], which_BQT.int()[:, None]


@cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    """A score's c·tanh(score / c), as Gemma 2 has it; the same function each time, so that nothing compiles anew."""
    if softcap is None:
        return None

    def capped(score: Tensor, *_place: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
