"""`dlm show`: the attention pattern of a recipe, drawn from the predicate that training and decoding use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dlm_lightning import catalog
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import PLACEHOLDER, WITHOUT_DEVICES, parse, quiet
from dlm_lightning.view import Batch, View, attention_mask

LENGTH, BLOCK = 12, 4
MASK_ID = -1


def show(name: str, overrides: Sequence[str], out: str | None) -> str:
    """Draw a recipe's pattern over 12 tokens in blocks of 4 (or the block size given), as text and as a PNG.

    Returns the drawing in characters and, in its last line, the path of the PNG.
    """
    quiet()
    found = catalog.find(name)
    catalog.make_importable(found)
    config = catalog.compose(found.path)
    if "block_size" in config.get("model", {}).get("init_args", {}) and not any(
        "block_size" in word for word in overrides
    ):
        overrides = [*overrides, f"model.block_size={BLOCK}"]
    recipe = parse(config, [*overrides, *WITHOUT_DEVICES], PLACEHOLDER).model
    view = example(recipe)
    sees_SS = attention_mask(view, recipe.predicate)[0]
    path = Path(out or f"{found.name}.png")
    save(view, sees_SS, found.name, path)
    return f"{characters(view, sees_SS)}\npicture: {path.resolve()}"


def example(recipe: Recipe) -> View:
    """A view of one document of 12 tokens, masked as in training at t = 1/2 with fixed uniforms."""
    position_1L = torch.arange(LENGTH)[None]
    u_1L = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(1))
    maskable_1L = position_1L > 0
    batch = Batch(
        position_1L, position_1L, 0 * position_1L, maskable_1L, u_1L, torch.full((1, LENGTH), 0.5), torch.tensor([0])
    )
    copies = recipe.noisy(batch, recipe.pattern)
    masks = [mask_BL for mask_BL, _ in copies]
    return recipe.pattern.lay_out(batch, masks, MASK_ID, with_ar_copy=recipe.ar_weight > 0)


def labels(view: View) -> list[str]:
    """One label per token: its position, primed for each noisy copy, `·` after it where it is masked."""
    rows = zip(view.position_BS[0].tolist(), view.copy_BS[0].tolist(), view.ids_BS[0].tolist(), strict=True)
    return [f"{position}{chr(39) * copy}{'·' if token == MASK_ID else ''}" for position, copy, token in rows]


def characters(view: View, sees_SS: Tensor) -> str:
    """The pattern in characters: a row per query, ██ where it sees a key of copy 0, ▓▓ one of a noisy copy."""
    names = labels(view)
    noisy_S = (view.copy_BS[0] > 0).tolist()
    lines = ["rows attend to columns; ' marks a noisy copy, · a masked token", ""]
    for query, name in enumerate(names):
        shades = ("▓▓" if noisy else "██" for noisy in noisy_S)
        cells = (shade if sees else "  " for shade, sees in zip(shades, sees_SS[query].tolist(), strict=True))
        lines.append(f"{name:>6} │{''.join(cells)}│")
    return "\n".join(lines)


def save(view: View, sees_SS: Tensor, title: str, path: Path) -> None:
    """The pattern as a PNG: colour says which copy the key belongs to."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    copy_S = view.copy_BS[0]
    shade_SS = torch.where(sees_SS, 1 + copy_S[None, :], 0)
    size = 2.2 + 0.22 * len(copy_S)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#f4f4f2", "#1f4e79", "#d9822b", "#5a9e6f", "#8c6bb1"]
    axes.imshow(shade_SS, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, interpolation="none")
    ticks, names = range(len(copy_S)), labels(view)
    axes.set_xticks(ticks, names, fontsize=7, rotation=90)
    axes.set_yticks(ticks, names, fontsize=7)
    for edge in copy_S.diff().nonzero().flatten().tolist():
        axes.axhline(edge + 0.5, color="black", linewidth=0.8)
        axes.axvline(edge + 0.5, color="black", linewidth=0.8)
    axes.set_title(f"{title}: rows attend to columns\n' noisy copy   · masked", fontsize=10)
    axes.set_xticks([x - 0.5 for x in ticks], minor=True)
    axes.set_yticks([x - 0.5 for x in ticks], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
