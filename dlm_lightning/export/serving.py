"""Who can serve a model: the published layouts that engines and other code know by name, and what fits them."""

from __future__ import annotations

from dlm_lightning.layouts import LAYOUTS
from dlm_lightning.module import Recipe

FORMS = {"sdar": "sdar", "fast_dllm_v2": "Fast_dLLM_Qwen"}  # by what is typed; a LAYOUT each
NAMES = {"sdar": "SDAR", "fast_dllm_v2": "Fast-dLLM v2"}
READERS = {  # and what must be said to them
    "sdar": "SGLang (`--dllm-algorithm LowConfidence`, and in `--dllm-algorithm-config` a YAML with "
    "`block_size: {size}`) and LMDeploy (`--dllm-block-length {size}`)",
    "fast_dllm_v2": "the code that Fast-dLLM v2 published, but by no engine",
}


def misfits(recipe: Recipe, form: str) -> list[str]:
    """Why a model does not fit a layout; nothing if it does."""
    layout, pattern, config = LAYOUTS[FORMS[form]], recipe.pattern, recipe.denoiser.network.config
    why = []
    if config.model_type != layout.family:
        why.append(f"its layers are those of {layout.family}, and this model's of {config.model_type}")
    if getattr(config, "sliding_window", None) is not None:
        why.append("it has no sliding windows")
    if pattern.block_size is None:
        why.append("it decodes by blocks, and this model has none")
    elif pattern.context_rank == "causal":
        why.append("it reads prompts by whole blocks, and this model token by token (model.context_rank: causal)")
    if recipe.shift != layout.shift:
        why.append(f"it predicts with shift {layout.shift}, and this model with {recipe.shift}")
    if recipe.mask_id != layout.mask_id:
        why.append(f"its mask token is {layout.mask_id}, and this model's {recipe.mask_id}")
    return why


def verdict(recipe: Recipe) -> str:
    """Who can serve a model, by which form of export, and who cannot and why."""
    said = []
    for form, name in NAMES.items():
        if why := misfits(recipe, form):
            said.append(f"It does not fit the layout of {name}: {'; '.join(why)}.")
        else:
            by = READERS[form].format(size=recipe.pattern.block_size)
            said.append(f"It fits the layout of {name} (`dlm export --as {form}`), which is read by {by}.")
    return " ".join(said)
