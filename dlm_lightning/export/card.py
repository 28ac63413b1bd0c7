"""The model card of an export: what the run's own files say of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData

from dlm_lightning import __version__, checkpoint
from dlm_lightning.export.serving import verdict
from dlm_lightning.module import Recipe
from dlm_lightning.report.content import DECODER, PLACES, Run, read_run

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```"""
MEASURED = {
    "val/nelbo": "NELBO, nats per token",
    "val/masked_ce": "masked cross-entropy, unweighted",
    "val/ar_nll": "next-token NLL, read causally",
}
DRIFTS = {"rel_fro": "‖ΔW‖ / ‖W₀‖", "mean_abs": "mean of the absolute differences"}


def card(recipe: Recipe, name: str) -> str:
    """The README.md of a model that is called so; of its source, the licence is carried over."""
    folder = Path(recipe.trainer.default_root_dir)
    run, newest = read_run(folder), checkpoint.newest(folder)
    facts, steps = recipe.reading(), 0  # of a model that was not trained here
    if newest:
        content = checkpoint.load(newest / checkpoint.STATE)
        facts, steps = content[checkpoint.FACTS], content["global_step"]
    source = recipe.source_name if _on_the_hub(recipe.source_name) else None
    front = ModelCardData(
        license=recipe.source.licence if recipe.source else None,
        base_model=source,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["diffusion language model", "block diffusion", "dlm_lightning"],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---\n\n# {name}",
        f"A diffusion language model, {_origin(recipe, run, steps)}. "
        "It fills in several masked tokens per forward pass.",
        USE.format(name=name),
        f"`generate` decodes {_decoding(recipe)}.",
        _table("how it was trained", _trained(recipe, run, facts, steps)),
        _table("on held-out data | before | after", _likelihood(run, steps)),
        _table("drift of the weights from the source | attention | FFN", _drift(run)),
        _table(f"what it answers, {DECODER} | exact | tokens per forward", _answers(run)),
        f"## Who can serve it\n\nPlain transformers, by the code in this folder. {verdict(recipe)}",
        f"Made with torch {torch.__version__} and transformers {transformers.__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _on_the_hub(source: str | None) -> bool:
    return source is not None and source.count("/") == 1 and not Path(source).expanduser().exists()


def _origin(recipe: Recipe, run: Run, steps: int) -> str:
    by = f"by the recipe `{run.recipe}` of dlm_lightning {__version__}"
    if recipe.source is None:
        return f"trained from scratch {by}"
    local = f"a local {recipe.source.config.model_type} model (weights `{recipe.source.fingerprint()}`)"
    source = f"`{recipe.source_name}`" if _on_the_hub(recipe.source_name) else local
    return f"converted from {source} {by}" if steps else f"that of {source}, which was not trained here"


def _decoding(recipe: Recipe) -> str:
    size = recipe.pattern.block_size
    if size is None:
        return "in blocks of 32 tokens, each in 16 forwards, while all tokens see each other"
    return f"in blocks of {size} tokens, and fills in what has a probability above 0.9, at least one token per forward"


def _trained(recipe: Recipe, run: Run, facts: dict[str, Any], steps: int) -> Iterator[tuple[str, str]]:
    """What the checkpoint and the run's config state, without what lies on this machine."""
    if steps:
        batch, length = facts["global batch size"], run.config["data.row_length"]
        yield "steps", f"{steps:,}" + (f" of {run.config['trainer.max_steps']:,}" if run.unfinished else "")
        yield "tokens in rows", f"{steps * batch * length:,} ({batch} rows of {length:,} a step)"
        yield "tokens through the network", f"{steps * batch * length * recipe.copies:,}"
        yield "precision", str(run.config["trainer.precision"])
    for key, value in facts.items():
        if key.startswith("model.") and key != "model.source" and (text := _shown(value)):
            yield f"`{key}`", text
    for key, value in run.config.items():
        if steps and key.startswith("data.") and key not in PLACES and (text := _shown(value)):
            yield f"`{key}`", text


def _shown(value: Any) -> str:
    """In words; nothing for nothing, and for what lies on this machine."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    words = [str(item) for item in values]
    return "" if any(word.startswith(("/", "~")) for word in words) else ", ".join(words)


def _likelihood(run: Run, steps: int) -> Iterator[tuple[str, ...]]:
    for name, meaning in MEASURED.items():
        if found := [value for step, value in run.series(name) if step <= steps]:
            yield meaning, f"{found[0]:.3f}", f"{found[-1]:.3f}"


def _drift(run: Run) -> Iterator[tuple[str, ...]]:
    for metric, meaning in DRIFTS.items():
        found = [run.drifted(module, metric) for module in ("attention", "FFN")]
        if None not in found:
            yield meaning, *(f"{value:.3g}" for value in found)


def _answers(run: Run) -> Iterator[tuple[str, ...]]:
    for row in run.rows(DECODER):
        exact, per_forward = run.accuracy(row["task"]), run.per_forward(row["task"])
        if exact is not None and per_forward is not None:
            yield row["task"], f"{exact:.0%}", f"{per_forward:.2f}"


def _table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table, or nothing without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    columns = head.split(" | ")
    if not lines:
        return ""
    if len(columns) == 1:
        columns.append("")
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines])
