"""What the network has seen of a document while it is decoded: a slot per position.

Shapes: B rows, a document each; S tokens of a row that a forward shows; P slots of a row, K of them in use; G key and
value heads; D hidden size, or that of a head.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import transformers
from torch import Tensor

from dlm_lightning.view import View


class Cache(transformers.Cache):
    """Of each position the token that was shown there last: coordinates, keys and values of all layers, hidden state.

    A forward shows tokens at any positions of each row. They replace what their slots held, and look at all slots that
    the predicate lets them see. So its logits are those of a forward that shows all tokens, as long as nothing that is
    looked at would be another by now. A token may be shown twice at once: rows that show fewer are filled up so.

    Args:
        positions: the most tokens that a document will have.
        static: look at all slots in each forward, so that shapes do not change and nothing waits for the device.
    """

    def __init__(self, positions: int, static: bool = False) -> None:
        super().__init__(layers=[])
        self.positions, self.static = positions, static
        self.reach = 0  # no slot from here on is in use
        self._slots: dict[Hashable, Tensor] = {}  # [B, P, …] each
        self._place_BS = torch.empty(0)
        self._run: int | None = None  # where the tokens of all rows lie, if they lie side by side

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(slots.nbytes for slots in self._slots.values())

    @property
    def ids_BP(self) -> Tensor:
        """The tokens that were shown last, -1 where there were none."""
        return self._slots[0]

    def show(self, view: View) -> View:
        """Note the tokens [B, S] that a forward is about to show; returns all that it may look at, [B, K]."""
        self._place_BS = place_BS = view.position_BS
        if self.static:
            self.reach, self._run = self.positions, None
        else:
            first, last = place_BS[0, 0].item(), place_BS.max().item()
            self.reach = max(self.reach, int(last) + 1)
            run_S = torch.arange(first, first + place_BS.shape[1], device=place_BS.device)
            self._run = int(first) if torch.equal(place_BS, run_S.expand_as(place_BS)) else None
        held = [self._put(n, tensor_BS, empty=-1) for n, tensor_BS in enumerate(view.coordinates)]
        ids, position, rank, order, copy, document = held
        return View(ids, position, rank, order, copy, document)

    def update(self, k_BGSD: Tensor, v_BGSD: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by a layer: its keys and values of the tokens shown; returns those of all slots, [B, G, K, D]."""
        k_BKGD = self._put(("keys", layer_idx), k_BGSD.transpose(1, 2))
        v_BKGD = self._put(("values", layer_idx), v_BGSD.transpose(1, 2))
        return k_BKGD.transpose(1, 2), v_BKGD.transpose(1, 2)

    def remember(self, hidden_BSD: Tensor) -> Tensor:
        """Keep the hidden states of the tokens shown; returns those of all slots, [B, K, D]."""
        return self._put("hidden", hidden_BSD)

    def select(self, rows_N: Tensor) -> None:
        """Keep these rows, in this order."""
        self._slots = {name: slots[rows_N] for name, slots in self._slots.items()}

    def _put(self, name: Hashable, new: Tensor, empty: int = 0) -> Tensor:
        if name not in self._slots:
            self._slots[name] = new.new_full((new.shape[0], self.positions, *new.shape[2:]), empty)
        slots = self._slots[name]
        if self._run is not None:
            slots[:, self._run : self._run + new.shape[1]] = new
        else:
            slots[torch.arange(len(new), device=new.device)[:, None], self._place_BS] = new
        return slots[:, : self.reach]
