"""Whether a real network does what its views say: one token is changed at a time; what moves is compared with `sees`.

Shapes: S tokens of the probed row, R rows of one batch or of all, D hidden size, N tokens whose logits are compared,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dlm_lightning.denoiser import Denoiser
from dlm_lightning.source import decoder_layers
from dlm_lightning.view import AUTOREGRESSIVE, Batch, Pattern, View, attention_mask, sees

LENGTHS = (9, 6)  # of two documents in one row
BLOCK_SIZE = 4  # at most, so that a document has three blocks, the last one ragged
ROWS = 8  # that pass the network together


def probe_view(pattern: Pattern, mask_id: int, token_ids: list[int]) -> View:
    """One row of two documents under a pattern, its blocks cut short, half masked; [1, S], a few dozen tokens."""
    length = sum(LENGTHS)
    ids_BL = torch.tensor([[token_ids[n * len(token_ids) // length] for n in range(length)]])
    position_BL = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    document_BL = torch.cat([torch.full((n,), d) for d, n in enumerate(LENGTHS)])[None]
    mask_BL = position_BL % 2 == 1
    nothing_BL = torch.zeros(1, length)
    batch = Batch(ids_BL, position_BL, document_BL, mask_BL, nothing_BL, nothing_BL, torch.zeros(1, dtype=torch.long))
    if pattern.block_size is not None:
        pattern = replace(pattern, block_size=min(pattern.block_size, BLOCK_SIZE))
    masks = [mask_BL, ~mask_BL & (position_BL > 0)] if pattern.context == "clean" else [mask_BL]
    return pattern.lay_out(batch, [] if pattern == AUTOREGRESSIVE else masks, mask_id)


@torch.no_grad()
def check_sight(denoiser: Denoiser, pattern: Pattern) -> int:
    """Check in the real network that exactly what may move does when one token changes; returns the number of pairs.

    After the first layer a token must have moved what sees it, and after each layer nothing that it cannot have reached
    by then. Raises ValueError naming a pair for which that does not hold.
    """
    device = next(denoiser.parameters()).device
    view = probe_view(pattern, denoiser.mask_id, denoiser.token_ids).to(device)
    states, windows = _states(denoiser, _changed(view, denoiser))
    masks = [attention_mask(view, denoiser.predicate, window=window)[0] for window in windows]
    narrowest_SS, widest_SS = torch.stack(masks).all(0), torch.stack(masks).any(0)
    reach_SS = torch.eye(len(widest_SS), dtype=torch.bool, device=device)
    for depth, hidden_RSD in enumerate(states):
        reach_SS = reach_SS | (widest_SS.float() @ reach_SS.float() > 0)
        base_RSD, again_RSD, *changed = hidden_RSD.split(ROWS)  # the same place of a batch rounds alike
        change_RSD = torch.cat([batch_RSD - base_RSD for batch_RSD in changed])[: len(reach_SS)]
        moved_SS = change_RSD.abs().amax(-1).T  # of each token, by each changed token
        noise = (again_RSD - base_RSD).abs().max()
        leaks_SS = (moved_SS > 10 * noise + 1e-6 * hidden_RSD.abs().max()) & ~reach_SS
        blind_SS = (moved_SS <= noise) & narrowest_SS if depth == 0 else torch.zeros_like(leaks_SS)
        for wrong_SS, moves, sight in ((leaks_SS, "moves", "does not see"), (blind_SS, "does not move", "sees")):
            if wrong_SS.any():
                q, k = (_place(view, n) for n in wrong_SS.nonzero()[0].tolist())
                raise ValueError(
                    f"{denoiser.network.config.model_type} does not attend as its view says: in layer {depth + 1} the "
                    f"token at {q} {moves} with the one at {k}, which it {sight}"
                )
    return widest_SS.numel()


@torch.no_grad()
def check_readout(denoiser: Denoiser) -> float:
    """Check that logits of a causal view are those of the network's own forward; returns ‖ours − theirs‖ / ‖theirs‖.

    Not for a network that FSDP2 has sharded, which has no forward of its own. Raises ValueError beyond rounding.
    """
    network, device = denoiser.network, next(denoiser.parameters()).device
    view = probe_view(AUTOREGRESSIVE, denoiser.mask_id, denoiser.token_ids).to(device)
    view = view[:, : LENGTHS[0]]  # packing is ours alone
    keep_N = torch.arange(1, LENGTHS[0], device=device)
    own, predicate = network.config._attn_implementation, denoiser.predicate
    try:
        denoiser.predicate = sees  # a recipe's own is not what transformers computes
        ours_NV = denoiser(view, keep_N)
        network.set_attn_implementation("eager")  # the one that every family has
        theirs_NV = network(input_ids=view.ids_BS, position_ids=view.position_BS, use_cache=False).logits[0, keep_N - 1]
    finally:
        network.set_attn_implementation(own)
        denoiser.predicate = predicate
    known = denoiser.token_ids
    theirs_NV = theirs_NV[:, known].float()
    error = float((ours_NV[:, known] - theirs_NV).norm() / theirs_NV.norm())
    if not error < (1e-3 if next(network.parameters()).dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{network.config.model_type} does more to its logits than is done here (or attends otherwise than by its "
            f"causal mask): they differ by {error:.1e}"
        )
    return error


def _changed(view: View, denoiser: Denoiser) -> View:
    """Two batches of the row as it is, then the row with each token changed in turn, up to whole batches: [R, S]."""
    size, known = view.ids_BS.shape[1], denoiser.token_ids
    count = 2 * ROWS + -(-size // ROWS) * ROWS
    ids_RS = view.ids_BS.repeat(count, 1)
    for n in range(size):
        now = int(ids_RS[0, n])
        other = known[(known.index(now) + len(known) // 3) % len(known)] if now in known else known[0]
        ids_RS[2 * ROWS + n, n] = other
    return replace(view[[0] * count,], ids_BS=ids_RS)


def _states(denoiser: Denoiser, view: View) -> tuple[list[Tensor], set[int | None]]:
    """The hidden states [R, S, D] of a view after each layer, and the sliding windows that layers have (None: none)."""
    layers = decoder_layers(denoiser.network)
    states: list[list[Tensor]] = [[] for _ in layers]
    windows: set[int | None] = set()

    def look(own: list[Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, options: dict[str, Any], output: Any) -> None:
            own.append((output[0] if isinstance(output, tuple) else output).float())
            windows.update(options["attention_plan"].windows)

        return hook

    hooks = [
        layer.register_forward_hook(look(own), with_kwargs=True) for layer, own in zip(layers, states, strict=True)
    ]
    try:
        for first in range(0, len(view.ids_BS), ROWS):
            denoiser(view[first : first + ROWS,], view.ids_BS.new_empty(0))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(own) for own in states], windows or {None}


def _place(view: View, n: int) -> str:
    copy, position, document = (int(x[0, n]) for x in (view.copy_BS, view.position_BS, view.document_BS))
    return f"position {position} of copy {copy}, document {document}"
