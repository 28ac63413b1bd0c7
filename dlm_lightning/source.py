"""The AR source: where a pretrained model comes from, and its tensors read slice by slice from safetensors."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dlm_lightning import layouts

log = logging.getLogger(__name__)
SAVED_MODEL = "model"  # the Hugging Face folder inside a run folder
AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of tokenizers that are what tokenizer.json says
FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]  # of a hub repository; code only if it is trusted


def locate(source: str, weights: bool = True, code: bool = False) -> Path:
    """The local folder of a source: a folder, a run folder, a folder of numbered runs (the newest), or a hub id.

    Raises FileNotFoundError, naming what is missing. Without `weights`, none are fetched or asked for; with `code`, the
    hub's Python files are fetched too.
    """
    check = _with_weights if weights else Path
    patterns = [*FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    path = Path(source).expanduser()
    if path.is_dir():
        runs = sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)
        for folder in [path, path / SAVED_MODEL, *(run / SAVED_MODEL for run in runs)]:
            if (folder / "config.json").is_file():
                return check(folder)
        raise FileNotFoundError(f"model.source: {source} holds no model (no config.json in it)")
    if source.count("/") != 1 or source.startswith((".", "~", "/", "runs/")):
        hint = "; `dlm fit ar_source` trains one" if Path(source).name == "ar_source" else ""
        raise FileNotFoundError(f"model.source: there is no folder {source}{hint}")
    try:
        return check(Path(snapshot_download(source, allow_patterns=patterns)))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"model.source: {source} is no local folder and cannot be fetched from the hub"
        ) from error


def _with_weights(folder: Path) -> Path:
    if (folder / SAFE_WEIGHTS_NAME).is_file() or (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return folder
    if pickled := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"model.source: {folder} holds its weights as {pickled[0]} only, a pickle, which could run code; "
            "safetensors are read and nothing else"
        )
    raise FileNotFoundError(f"model.source: {folder} holds a config but no weights ({SAFE_WEIGHTS_NAME})")


class Source:
    """A Hugging Face folder with config, tokenizer and safetensors; tensors are memory-mapped and never all loaded.

    Args:
        source: a hub id, a local folder, or a run folder of this project.
        weights: false for config and tokenizer alone; there are no tensors then.
        trusted: run the code that the folder brings along, where it does.
    """

    def __init__(self, source: str, weights: bool = True, trusted: bool = False) -> None:
        self.folder, self.trusted = locate(source, weights, code=trusted), trusted
        self._file_of: dict[str, str] = {}
        self._stored: dict[str, str] = {}  # a tensor's name in its file, which a published layout may have its own for
        if weights:
            self._index()

    def _index(self) -> None:
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        try:
            named = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
        except (KeyError, ValueError) as error:
            raise ValueError(f"model.source: {index} is damaged: {error}") from error
        files = sorted(set(named.values()) or {SAFE_WEIGHTS_NAME})
        if missing := [file_name for file_name in files if not (self.folder / file_name).is_file()]:
            raise FileNotFoundError(f"model.source: {self.folder} lacks {', '.join(missing)}")
        for file_name in files:
            try:
                with safe_open(self.folder / file_name, "pt") as file:
                    found = layouts.renamed(self.folder, file.keys())
                    self._stored |= found
                    self._file_of |= dict.fromkeys(found, file_name)
            except SafetensorError as error:
                raise ValueError(f"model.source: {self.folder / file_name} is damaged: {error}") from error

    @property
    def config(self) -> PretrainedConfig:
        """The source's configuration, a new copy at each call."""
        return layouts.read_config(self.folder, self.trusted)

    @property
    def diffusion(self) -> layouts.Diffusion | None:
        """How the source was trained if it is a diffusion model already (a warm start); None for an AR model."""
        return layouts.stated(self.folder)

    @property
    def licence(self) -> str | None:
        """The licence that the source's README states, as its tag."""
        card = self.folder / "README.md"
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
        return str(licence) if licence else None

    def tokenizer(self) -> Any:
        """The source's tokenizer; FileNotFoundError if the folder has none (transformers would make an empty one)."""
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise FileNotFoundError(f"model.source: {self.folder} holds no tokenizer")
        settings, config = self.folder / "tokenizer_config.json", self.config
        try:
            stated = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
            untrusted = "auto_map" in stated and not self.trusted
            # AutoTokenizer would take the class of the model's family, whose pre-tokenizer may be another.
            as_it_is = untrusted or stated.get("tokenizer_class") in AS_IT_IS
            if as_it_is and (self.folder / "tokenizer.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(self.folder, trust_remote_code=False)
            kind = {"tokenizer_type": config.model_type} if untrusted else {"config": config}
            return AutoTokenizer.from_pretrained(self.folder, **kind, trust_remote_code=self.trusted)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"model.source: the tokenizer of {self.folder} cannot be read: {error}") from error

    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the weights: a hash of file sizes and of samples from each file."""
        digest = hashlib.sha256()
        for name in sorted(set(self._file_of.values())):
            path = self.folder / name
            size = path.stat().st_size
            digest.update(f"{name} {size}".encode())
            with path.open("rb") as file:
                for place in range(16):
                    file.seek(size * place // 16)
                    digest.update(file.read(1 << 16))
        return digest.hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """The names of all tensors, as the model's family has them."""
        return [*self._file_of]

    @property
    def renamed(self) -> bool:
        """Whether the folder has other names for them, which transformers does not know."""
        return any(name != stored for name, stored in self._stored.items())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor (all by default), read from the memory-mapped file."""
        with self._open(name) as file:
            return file.get_slice(self._stored[name])[start:stop]

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        with self._open(name) as file:
            return file.get_slice(self._stored[name]).get_shape()

    def rows(self, name: str) -> int:
        """The length of a tensor's first dimension."""
        return self.shape(name)[0]

    def check(self, name: str, wanted: Sequence[int]) -> None:
        """ValueError for a tensor that is not there, or not in the shape that the config gives it."""
        if name not in self:
            raise ValueError(f"model.source: {self.folder} has no tensor {name}")
        if self.shape(name) != [*wanted]:
            raise ValueError(
                f"model.source: {self.folder}: {name} has shape {self.shape(name)}, "
                f"and by its config.json it would be {[*wanted]}"
            )

    def _open(self, name: str) -> safe_open:
        """The file that holds a tensor; ValueError if none does."""
        if name not in self:
            raise ValueError(f"model.source: {self.folder} has no tensor {name}")
        return safe_open(self.folder / self._file_of[name], "pt")


def build_config(values: dict[str, Any]) -> PretrainedConfig:
    """A transformers config from `model_type` and its keys; refuses a missing or unknown model type."""
    try:
        return AutoConfig.for_model(**values)
    except (TypeError, ValueError) as error:
        kind = values.get("model_type", "none")
        raise ValueError(f"model.config: model_type {kind} is not one that transformers knows") from error


def stated(source: str | None, key: str) -> Any:
    """What a source states of its own diffusion training, for a key of a recipe that is null; ValueError if nothing."""
    diffusion = Source(source).diffusion if source else None
    if diffusion is None or (value := getattr(diffusion, key)) is None:
        raise ValueError(
            f"model.{key}: null takes what a diffusion source states, and {source or 'no source'} states none"
        )
    return value


def check_convertible(config: PretrainedConfig, trusted: bool = False) -> None:
    """Refuse a model whose attention no mask of ours reaches, by name and with the reason.

    Of a class that transformers does not know, which comes with trusted code, the probe finds that out.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    reason = None
    if config.is_encoder_decoder:
        reason = "is an encoder-decoder model; only decoder-only models convert"
    elif config.get_text_config() is not config:
        reason = "has other parts beside its language model; give the text model alone"
    elif others:
        reason = f"has {', '.join(sorted(others))} layers, which no attention mask reaches"
    elif getattr(config, "quantization_config", None):
        reason = "has quantized weights; those that it was made of are needed"
    elif getattr(config, "num_attention_heads", None) is None:
        reason = "has no attention (a state-space or recurrent model), so no mask reaches it"
    elif kind is None and trusted:
        return
    elif kind is None or not getattr(kind, "_supports_attention_backend", False):
        reason = "has no causal model that uses transformers' attention interface, so its attention ignores our mask"
    if reason:
        raise ValueError(f"{config.model_type} {reason}")


def decoder_layers(network: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, in order: the modules that transformers keeps on one device, by class name."""
    names = set(network._no_split_modules or ())  # FSDP2 gives a sharded module a class of its own below the real one
    found = [module for module in network.modules() if names & {cls.__name__ for cls in type(module).__mro__}]
    if not found:
        raise ValueError(f"{network.config.model_type} names no decoder layers, which sharding and the probe go by")
    return found


def initial_row(table_VD: Tensor, init: int | str) -> Tensor:
    """The row [D] a mask token starts from: the `mean` of a table's rows, `random` around it, or a token's, by id."""
    if isinstance(init, int):
        return table_VD[init].float()
    table_VD = table_VD.float()
    if init == "mean":
        return table_VD.mean(0)
    generator = torch.Generator().manual_seed(0)
    return table_VD.mean(0) + table_VD.std(0) * torch.randn(table_VD.shape[1], generator=generator)


def build(
    config: PretrainedConfig,
    source: Source | None,
    attention: str,
    *,
    mask_row: tuple[int, int | str] | None = None,
    meta: bool = False,
    dtype: torch.dtype = torch.float32,
    trusted: bool = False,
) -> PreTrainedModel:
    """The network: from the source's weights, from random ones (source None), or empty on the meta device.

    Dropout is switched off. The vocabulary is `config.vocab_size`; rows that the source lacks hold the mean of its
    embeddings. `mask_row`, an id and its `initial_row`, sets one row of embedding and head, also one the source has.
    """
    check_convertible(config, trusted)
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if meta or source is None:
        with torch.device("meta" if meta else "cpu"):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=dtype, trust_remote_code=trusted
            )
    rows = config.vocab_size
    config.vocab_size = source.config.vocab_size
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if source.renamed else AutoModelForCausalLM
    network, loaded = kind.from_pretrained(
        None if source.renamed else source.folder,
        state_dict={name: source.read(name) for name in source.names} if source.renamed else None,
        config=config,
        attn_implementation=attention,
        dtype=dtype,
        trust_remote_code=trusted,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if unread := sorted(loaded["unexpected_keys"]):
        more = f" and {len(unread) - 1} more of its tensors" if len(unread) > 1 else ""
        log.warning("%s: the layers of %s have no %s%s", source.folder, config.model_type, unread[0], more)
    if wrong := loaded["missing_keys"] or {name for name, *_ in loaded["mismatched_keys"]}:
        source.check(min(wrong), network.get_parameter(min(wrong)).shape)  # transformers would put random numbers there
    old = config.vocab_size
    if rows != old:
        network.resize_token_embeddings(rows, mean_resizing=False)
    if rows != old or mask_row:
        ends: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
        with torch.no_grad():
            for weight in {id(layer.weight): layer.weight for layer in ends}.values():  # one, if they are tied
                row_of = dict.fromkeys(range(old, rows), "mean") | ({mask_row[0]: mask_row[1]} if mask_row else {})
                for row, init in row_of.items():
                    weight[row] = initial_row(weight[:old], init)
    return network.train()
