"""Which tiles of queries and keys have pairs that see each other, told from the bounds of their coordinates.

Shapes: B rows; Q tiles of queries and T tiles of keys, both of the same tokens. The last tile may be short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_lightning.view import View, attention_mask, sees


class Tiles(NamedTuple):
    """Of each tile of queries and each of keys: whether `some` pair may see, and whether `all` do; bool [B, Q, T].

    From bounds, both err on the side of looking: some pairs may be asked for in vain, none is missed.
    """

    some_BQT: Tensor
    all_BQT: Tensor


def tiles(view: View, size: int, predicate: Callable[[View, View], Tensor] = sees, window: int | None = None) -> Tiles:
    """The tiles of `size` tokens of a view that looks at itself, under a predicate and a sliding window.

    The family's own predicate is told from least and greatest coordinates, without a pair being looked at; another one
    from all pairs, a tile of queries at a time.
    """
    if predicate is not sees:
        return _from_pairs(view, size, predicate, window)
    least, greatest = _bounds(view, size)
    q, k = Range(least[:, :, None], greatest[:, :, None]), Range(least[:, None, :], greatest[:, None, :])
    some, every = _sees(q, k)
    if window is not None:
        reach = torch.maximum(q.most.position_BS - k.least.position_BS, k.most.position_BS - q.least.position_BS)
        apart = torch.maximum(q.least.position_BS - k.most.position_BS, k.least.position_BS - q.most.position_BS)
        some, every = some & (apart < window), every & (reach < window)
    return Tiles(some, every)


class Range(NamedTuple):
    """The least and the greatest coordinates of tiles, as views of a token per tile."""

    least: View
    most: View


def _sees(q: Range, k: Range) -> tuple[Tensor, Tensor]:
    """Whether some, and whether all tokens of ranges q see those of ranges k; see `view.sees`."""

    def meet(name: str) -> Tensor:
        return (getattr(q.least, name) <= getattr(k.most, name)) & (getattr(k.least, name) <= getattr(q.most, name))

    def agree(name: str) -> Tensor:
        return (getattr(q.least, name) == getattr(k.most, name)) & (getattr(k.least, name) == getattr(q.most, name))

    context = (k.least.copy_BS == 0) & (k.least.rank_BS < q.most.rank_BS)
    group = meet("copy_BS") & meet("rank_BS") & (k.least.order_BS <= q.most.order_BS)
    all_context = (k.most.copy_BS == 0) & (k.most.rank_BS < q.least.rank_BS)
    all_group = agree("copy_BS") & agree("rank_BS") & (k.most.order_BS <= q.least.order_BS)
    return meet("document_BS") & (context | group), agree("document_BS") & (all_context | all_group)


def _bounds(view: View, size: int) -> tuple[View, View]:
    """The least and the greatest coordinates of each tile, as views [B, Q]."""
    coordinates_CBS = torch.stack(view.coordinates)
    S = coordinates_CBS.shape[2]
    last = coordinates_CBS[:, :, -1:].expand(-1, -1, -S % size)  # a short tile is filled up with its last token
    tiled = torch.cat([coordinates_CBS, last], 2).unflatten(2, (-1, size))
    return View(*tiled.amin(3).unbind()), View(*tiled.amax(3).unbind())


def _from_pairs(view: View, size: int, predicate: Callable[[View, View], Tensor], window: int | None) -> Tiles:
    short = -view.ids_BS.shape[1] % size
    some, every = [], []
    for first in range(0, view.ids_BS.shape[1], size):
        seen_BSS = attention_mask(view[:, first : first + size], predicate, view, window)
        some.append(F.pad(seen_BSS.any(1), (0, short)).unflatten(1, (-1, size)).any(2))
        every.append(F.pad(seen_BSS.all(1), (0, short), value=True).unflatten(1, (-1, size)).all(2))
    return Tiles(torch.stack(some, 1), torch.stack(every, 1))
