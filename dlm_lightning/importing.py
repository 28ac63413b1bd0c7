"""`dlm import`: a diffusion model that was trained elsewhere, as a run at step 0 that can be decoded and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dlm_lightning import catalog, runs
from dlm_lightning.parsing import parse, quiet
from dlm_lightning.source import Source, check_convertible
from dlm_lightning.training import note

FIXED = ("model", "model.class_path", "model.source", "model.config", "model.pretrained")
KNOWN = ("exports of this project", "SDAR", "Fast-dLLM v2", "Dream", "LLaDA")


def import_model(source: str, overrides: Sequence[str] = (), folder: str | None = None) -> Path:
    """Make a run folder around a model's folder or hub id, and return it; the weights stay where they are.

    Its recipe has the pattern that the model states; overrides may say what it does not. Raises ValueError or
    FileNotFoundError, naming what is missing, for a model that cannot be read.
    """
    quiet()
    if given := [word for word in overrides if word.split("=")[0] in FIXED]:
        raise ValueError(f"{given[0]}: the folder says it, and an import takes it from there")
    model = Source(source)
    stated = model.diffusion
    if stated is None:
        raise ValueError(
            f"{source} says nothing of diffusion that is known here ({', '.join(KNOWN)}); an autoregressive model is "
            "converted by `dlm fit`"
        )
    _check_tensors(model)
    name = "full_bidirectional" if stated.block_size is None else "block_causal"
    own = [f"model.source={source}", "model.shift=null"]
    if stated.block_size is not None:
        own += [f"model.block_size={stated.block_size}"]
        own += [f"model.{key}={value}" for key in ("context", "context_rank") if (value := getattr(stated, key))]
    found = catalog.find(name)
    catalog.make_importable(found)
    words = [*own, *overrides]
    run = runs.create(model.folder.name, folder)
    try:
        cli = parse(catalog.compose(found.path), words, run)
        cli.model.trainer = cli.trainer
        cli.model.check_shift()
        cli.model.mask_id  # noqa: B018  # refuses a mask token that there is not
        note(run, found, cli, words, imported=True)
    except BaseException:
        runs.discard(run)
        raise
    return run


def _check_tensors(model: Source) -> None:
    """Refuse a folder that has not just the tensors that its config asks for, before a run is made of it."""
    config = model.config
    check_convertible(config)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a value
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"model.source: no model can be made of {model.folder / 'config.json'}: {reason}") from error
    for name, parameter in network.named_parameters():  # of tied ones, the first
        model.check(name, parameter.shape)
    known = {*network.state_dict(), *(name for name in model.names if name.endswith("rotary_emb.inv_freq"))}
    if unread := sorted({*model.names} - known):
        raise ValueError(
            f"model.source: {model.folder} has a tensor {unread[0]}, which its config.json does not ask for"
        )
