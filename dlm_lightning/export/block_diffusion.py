"""A diffusion model that plain transformers loads, with the code that decodes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from dlm_lightning import layouts
from dlm_lightning.decode.decoder import end_tokens
from dlm_lightning.export.card import card
from dlm_lightning.module import Recipe
from dlm_lightning.view import AUTOREGRESSIVE, sees

MODELLING = Path(__file__).with_name("modeling_block_diffusion.py")
CONFIG, MODEL = "BlockDiffusionConfig", "BlockDiffusionForCausalLM"  # its classes
MASK = "<|mask|>"  # what a mask token is called that the tokenizer does not know


def check(recipe: Recipe) -> None:
    """Refuse what the code beside the weights cannot compute; give the tokenizer its mask token."""
    if recipe.pattern == AUTOREGRESSIVE:
        raise ValueError("the run's model is autoregressive; `--as ar` writes it")
    if recipe.predicate is not sees:
        raise ValueError(f"{type(recipe).__name__} says itself who sees whom, which no code outside of it can know")
    config = recipe.denoiser.network.config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"a model of {config.model_type} comes with code of its own, which cannot be exported")
    tokenizer, vocabulary = recipe.tokenizer, recipe.tokenizer.get_vocab()
    known = {token: text for text, token in vocabulary.items()}
    if recipe.mask_id in known or recipe.mask_id == len(tokenizer):
        tokenizer.add_special_tokens({"mask_token": known.get(recipe.mask_id, MASK)})


def complete(
    name: str,
    recipe: Recipe,
    folder: Path,
    model_type: str | None = None,
    architecture: str = MODEL,
    keys: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the config that says how the model is read, the code, and the card of a model that is called `name`.

    `model_type`, by default one of our own, `architecture` and further `keys` of the config are a published layout's.
    """
    denoiser, config = recipe.denoiser, recipe.denoiser.network.config
    model_type = model_type or layouts.EXPORTED + config.model_type
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config_class = architecture.removesuffix("ForCausalLM") + "Config"
    names = {"dlm_qwen3": model_type, "Qwen3Config": type(config).__name__, "Qwen3ForCausalLM": kind.__name__}
    code = MODELLING.read_text(encoding="utf-8")
    for theirs, ours in {**names, CONFIG: config_class, MODEL: architecture}.items():
        code = code.replace(theirs, ours)
    (folder / MODELLING.name).write_text(code, encoding="utf-8")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert recipe.diffusion is not None
    values |= {
        "model_type": model_type,
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"{MODELLING.stem}.{config_class}",
            "AutoModelForCausalLM": f"{MODELLING.stem}.{architecture}",
        },
        **keys,
        layouts.KEY: {**asdict(recipe.diffusion), layouts.BANNED: spans(denoiser.banned_X.tolist())},
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer = recipe.tokenizer
    ends = end_tokens(denoiser, [tokenizer.eos_token_id])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    GenerationConfig(eos_token_id=ends or None, pad_token_id=pad).save_pretrained(folder)
    (folder / "README.md").write_text(card(recipe, name), encoding="utf-8")


def spans(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as spans [from, to)."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found
