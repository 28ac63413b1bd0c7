"""What a folder says of a diffusion model in it: how it was trained, and whose layers it has.

Published diffusion models come with code of their own, which is not run here: their layers are those of a model that
transformers knows, and what their code adds (mask, shift, blocks) is what this project does itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

KEY = "dlm"  # of a config.json that this project wrote: how the model was trained
EXPORTED = "dlm_"  # before the family in the model_type of an export, which brings along the code that decodes it


@dataclass(frozen=True)
class Diffusion:
    """How a diffusion model was trained, as far as its folder states it; None is not stated.

    shift: `next_token` or `none`. block_size: tokens per block. mask_id: the row of the mask token. context,
    context_rank: what earlier blocks show, and in which order; see `view.Pattern`.
    """

    shift: str | None = None
    block_size: int | None = None
    mask_id: int | None = None
    context: str | None = None
    context_rank: str | None = None


@dataclass(frozen=True)
class Layout:
    """A published kind of model: the transformers family of its layers, and where its config states the rest.

    shift is that of its code, which no config states; mask_id is its code's default; architecture is its class.
    """

    family: str
    shift: str
    block_size_key: str | None
    mask_id: int | None
    architecture: str


LAYOUTS = {
    "sdar": Layout("qwen3", "none", "block_size", 151669, "SDARForCausalLM"),
    "Fast_dLLM_Qwen": Layout("qwen2", "next_token", "bd_size", 151665, "Fast_dLLM_QwenForCausalLM"),
    "Dream": Layout("qwen2", "next_token", None, None, "DreamModel"),
}


def read_config(folder: Path, trusted: bool = False) -> PretrainedConfig:
    """The config of a folder, of a published diffusion model as its layers' family; refuses what transformers lacks.

    Code that the folder brings along is run only if it is trusted, and never for a published layout.
    """
    values = _values(folder)
    if (family := _family(values)) and KEY in values:
        own = {"model_type", "architectures", "auto_map", KEY}
        return CONFIG_MAPPING[family].from_dict({k: v for k, v in values.items() if k not in own})
    if layout := LAYOUTS.get(values.get("model_type", "")):
        keys = {"model_type", "architectures", "auto_map", layout.block_size_key, "mask_token_id", KEY}
        return CONFIG_MAPPING[layout.family].from_dict({k: v for k, v in values.items() if k not in keys})
    if values.get("model_type") not in CONFIG_MAPPING and not (trusted and "auto_map" in values):
        raise ValueError(
            f"model.source: {folder} is of model_type {values.get('model_type', 'none')}, which transformers does not "
            "know; code that a model brings along is not run unless model.trust_remote_code is true"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    if hasattr(config, KEY):  # what is made of it states its own
        delattr(config, KEY)
    return config


def stated(folder: Path) -> Diffusion | None:
    """How the folder's diffusion model was trained; None for a model that says nothing of diffusion."""
    values = _values(folder)
    if own := values.get(KEY):
        for name in ("shift", "block_size", "mask_id"):
            if name not in own:
                raise ValueError(f"model.source: {folder / 'config.json'} states a diffusion model without its {name}")
        return Diffusion(**{field.name: own.get(field.name) for field in fields(Diffusion)})
    if layout := LAYOUTS.get(values.get("model_type", "")):
        block_size = values.get(layout.block_size_key) if layout.block_size_key else None
        return Diffusion(layout.shift, block_size, values.get("mask_token_id", layout.mask_id))
    return None


def _family(values: dict[str, Any]) -> str | None:
    """The family of an export's layers; None for any other config."""
    family = str(values.get("model_type", "")).removeprefix(EXPORTED)
    return family if family != values.get("model_type") and family in CONFIG_MAPPING else None


def _values(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model.source: {folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model.source: {folder / 'config.json'} is not a mapping of keys to values")
    return values
