"""`dlm probe`: before anything is trained, whether a source converts, what it consists of, what step 0 would say."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel

from dlm_lightning import catalog
from dlm_lightning.drift import place
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import WITHOUT_DEVICES, parse, quiet
from dlm_lightning.sight import check_readout, check_sight
from dlm_lightning.source import Source
from dlm_lightning.step_zero import step_zero

RECIPES = ("full_bidirectional", "block_causal", "complementary_mask")
BRIEF = ("data.val_rows=16", "data.batch_size=4", "trainer.enable_progress_bar=false")


def probe(name: str, overrides: Sequence[str] = ()) -> None:
    """Print a source's facts, and for each pattern whether it holds in the real network and what step 0 says.

    Overrides are those of a recipe, such as `data.paths` or `trainer.accelerator`. Raises ValueError with the reason
    for a source that cannot be converted.
    """
    quiet()
    source = Source(name)
    console = Console(highlight=False)
    network: PreTrainedModel | None = None
    for pattern in RECIPES:
        with tempfile.TemporaryDirectory() as run:
            cli = parse(_on(source, name, pattern), [*WITHOUT_DEVICES, *BRIEF, *overrides], run)
        recipe: Recipe = cli.model
        if network is None:
            recipe.configure_model()
            network = recipe.denoiser.network
            console.print(facts(recipe), parameters(network), sep="\n")
            error = check_readout(recipe.denoiser)
            print(f"logits under a causal view are the source's own, up to {error:.0e}")
        else:  # the same weights under another pattern
            recipe.denoiser = recipe.wrap(network)
        pairs = check_sight(recipe.denoiser, recipe.pattern)
        print(f"\n{pattern}: converts; who sees whom holds in the network for all {pairs} pairs of tokens")
        cli.trainer.validate(recipe, cli.datamodule, verbose=False)
        print(step_zero(recipe, cli.datamodule, cli.trainer.callback_metrics))


def _on(source: Source, name: str, pattern: str) -> dict:
    """A shipped recipe's config on the source, read as a diffusion source states that it is to be read."""
    config = catalog.compose(catalog.find(pattern).path)
    config["trainer"]["callbacks"] = []
    options = config["model"]["init_args"]
    options["source"] = name
    if source.diffusion:
        options["shift"] = source.diffusion.shift
        if source.diffusion.block_size and "block_size" in options:
            options["block_size"] = source.diffusion.block_size
    return config


def facts(recipe: Recipe) -> Table:
    """What the source is, as its folder states it, and which row the mask token has."""
    source = recipe.source
    assert source  # a probe without one does not come this far
    config = source.config
    heads = config.num_attention_heads
    tied = "tied to the embedding" if config.tie_word_embeddings else "of its own"
    table = Table(title=str(source.folder), title_justify="left", show_header=False)
    table.add_row(
        "architecture", f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
    )
    table.add_row(
        "attention", f"{heads} heads, {getattr(config, 'num_key_value_heads', heads)} for keys; {_windows(config)}"
    )
    table.add_row("positions", f"{config.max_position_embeddings}, {_rope(config)}")
    table.add_row("vocabulary", f"{len(recipe.tokenizer)} tokens in {config.vocab_size} rows, head {tied}")
    table.add_row("mask token", _mask(recipe, config.vocab_size))
    if trained := source.diffusion:
        about = f"shift {trained.shift}, block size {trained.block_size}, mask token {trained.mask_id}"
        table.add_row("trained as", f"a diffusion model: {about} (None is not stated)")
    table.add_row("licence", source.licence or "none stated")
    return table


def parameters(network: PreTrainedModel) -> Table:
    """Parameters per group, as weight drift groups them."""
    count: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        count[place(name)[1]] += parameter.numel()
    table = Table("group", "parameters", "share")
    for group, number in [*count.items(), ("all", count.total())]:
        table.add_row(group, f"{number:,}", f"{number / count.total():.1%}")
    return table


def _mask(recipe: Recipe, rows: int) -> str:
    if recipe.mask_id >= rows:
        return f"row {recipe.mask_id}, which is added and starts from {recipe.mask_init or 'mean'}"
    named = recipe.tokenizer.convert_ids_to_tokens(recipe.mask_id)
    return f"row {recipe.mask_id}, " + (f"the token {named}" if named else "a free one of the source")


def _windows(config: PretrainedConfig) -> str:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    sliding = config.num_hidden_layers if kinds is None else kinds.count("sliding_attention")
    return f"a sliding window of {window} in {sliding} layers" if window and sliding else "no sliding window"


def _rope(config: PretrainedConfig) -> str:
    rope = getattr(config, "rope_parameters", None)
    kinds = {value.get("rope_type") for value in (rope or {}).values() if isinstance(value, dict)} or {
        (rope or {}).get("rope_type")
    }
    return f"RoPE {', '.join(sorted(filter(None, kinds)))}" if rope else "learned"
