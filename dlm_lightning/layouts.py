"""What a folder says of a diffusion model in it: how it was trained, and whose layers it has.

Published diffusion models come with code of their own, which is not run here: their layers are those of a model that
transformers knows, and what their code adds (mask, shift, blocks) is what this project does itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

KEY = "dlm"  # of a config.json that this project wrote: how the model was trained
BANNED = "banned"  # in it, of an export: spans of ids that are no tokens
SHIFTS = ("none", "next_token")
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

    shift is that of its code, which no config states; mask_id is its code's default; architecture is its class. Where
    it has names of its own: keys, of its config, and tensors, by patterns that are replaced one after the other, with
    those of the family; needed, what its config must say, because its code would build other layers too.
    """

    family: str
    shift: str
    block_size_key: str | None
    mask_id: int | None
    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)
    needed: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def as_family(self, values: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Its config's keys and values as the family has them; ValueError for layers that are not the family's."""
        for key, value in self.needed.items():
            if (found := values.get(key)) != value:
                raise ValueError(
                    f"model.source: {folder / 'config.json'} has {key}: {json.dumps(found)}, and only with "
                    f"{json.dumps(value)} a {values['model_type']} has the layers of {self.family}"
                )
        own = {"model_type", "architectures", "auto_map", self.block_size_key, "mask_token_id", KEY, *self.needed}
        kept = {key: value for key, value in values.items() if key not in own and key not in self.keys}
        return kept | {ours: values[key] for key, ours in self.keys.items() if values.get(key) is not None}


LAYOUTS = {
    "sdar": Layout("qwen3", "none", "block_size", 151669, "SDARForCausalLM"),
    "Fast_dLLM_Qwen": Layout("qwen2", "next_token", "bd_size", 151665, "Fast_dLLM_QwenForCausalLM"),
    "Dream": Layout("qwen2", "next_token", None, None, "DreamModel"),
    "llada": Layout(
        "llama",
        "none",
        None,
        126336,
        "LLaDAModelLM",
        keys={
            "d_model": "hidden_size",
            "mlp_hidden_size": "intermediate_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "max_sequence_length": "max_position_embeddings",
            "embedding_size": "vocab_size",
            "weight_tying": "tie_word_embeddings",
        },
        needed={
            "block_type": "llama",
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "rope": True,
            "alibi": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
        },
        tensors={
            r"^model\.transformer\.wte\.": "model.embed_tokens.",
            r"^model\.transformer\.ln_f\.": "model.norm.",
            r"^model\.transformer\.ff_out\.": "lm_head.",
            r"^model\.transformer\.blocks\.": "model.layers.",
            r"\.attn_norm\.": ".input_layernorm.",
            r"\.([qkv]_proj)\.": r".self_attn.\1.",
            r"\.attn_out\.": ".self_attn.o_proj.",
            r"\.ff_norm\.": ".post_attention_layernorm.",
            r"\.ff_proj\.": ".mlp.gate_proj.",
            r"\.up_proj\.": ".mlp.up_proj.",
            r"\.ff_out\.": ".mlp.down_proj.",
        },
    ),
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
        return CONFIG_MAPPING[layout.family].from_dict(layout.as_family(values, folder))
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
    """How the folder's diffusion model was trained; None for a model that says nothing of diffusion.

    Raises ValueError, naming the key, for one that says too little, or two things of itself.
    """
    values = _values(folder)
    own, theirs = _own(folder, values), _published(folder, values)
    for key in fields(Diffusion) if own and theirs else ():
        one, other = getattr(own, key.name), getattr(theirs, key.name)
        if other is not None and one != other:
            raise ValueError(
                f"model.source: {folder / 'config.json'} states {key.name} {one} by its key {KEY}, and {other} "
                f"by those of {values['model_type']}"
            )
    return own or theirs


def _own(folder: Path, values: dict[str, Any]) -> Diffusion | None:
    """What a config of this project says."""
    own, place = values.get(KEY), folder / "config.json"
    if own is None and _family(values):
        raise ValueError(f"model.source: {place} is that of an export, and lacks the key {KEY}")
    if own is None:
        return None
    known = [key.name for key in fields(Diffusion)]
    if not isinstance(own, dict):
        raise ValueError(f"model.source: {place} has {KEY}: {json.dumps(own)}, which is no mapping")
    if unknown := own.keys() - {*known, BANNED}:
        raise ValueError(f"model.source: {place} has an unknown key {KEY}.{min(unknown)}")
    for name in ("shift", "block_size", "mask_id"):
        if name not in own:
            raise ValueError(f"model.source: {place} states a diffusion model without its {name}")
    found = Diffusion(**{name: own.get(name) for name in known})
    if found.shift not in SHIFTS:
        raise ValueError(f"model.source: {place} states shift {found.shift}, which is neither {' nor '.join(SHIFTS)}")
    return _checked(found, place)


def _published(folder: Path, values: dict[str, Any]) -> Diffusion | None:
    """What a config in a published layout says."""
    if not (layout := LAYOUTS.get(values.get("model_type", ""))):
        return None
    place, block_size = folder / "config.json", None
    if layout.block_size_key and (block_size := values.get(layout.block_size_key)) is None:
        raise ValueError(f"model.source: {place} lacks {layout.block_size_key}, the size of its blocks")
    return _checked(Diffusion(layout.shift, block_size, values.get("mask_token_id", layout.mask_id)), place)


def _checked(found: Diffusion, place: Path) -> Diffusion:
    """What was found, if its numbers are whole numbers."""
    for name in ("block_size", "mask_id"):
        value = getattr(found, name)
        if value is not None and type(value) is not int:
            raise ValueError(f"model.source: {place} states {name} {json.dumps(value)}, which is no whole number")
    return found


def renamed(folder: Path, tensors: Iterable[str]) -> dict[str, str]:
    """The names of a folder's tensors, by those that they have in the family."""
    layout, found = LAYOUTS.get(_values(folder).get("model_type", "")), {}
    for tensor in tensors:
        name = tensor
        for theirs, ours in (layout.tensors if layout else {}).items():
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    return found


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
    if not isinstance(kind := values.get("model_type", ""), str):
        raise ValueError(f"model.source: {folder / 'config.json'} has model_type {json.dumps(kind)}, which is no name")
    return values
