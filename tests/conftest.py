"""What tests share: a tiny tokenizer, tiny sources of three families, batches by document lengths, a plain reference.

All fixtures are functions or folders of session scope, so that hypothesis can use them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels written in Triton then run on a CPU

from hypothesis import settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dlm_lightning import attention, cli
from dlm_lightning.data.tokenizer import trained_tokenizer
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.loss import score, weighted_sum
from dlm_lightning.module import Recipe
from dlm_lightning.optimizer import LrScale
from dlm_lightning.recipes.ar_source import ArSource
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.recipes.full_bidirectional import FullBidirectional
from dlm_lightning.source import Source, build
from dlm_lightning.view import Batch

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")

FAMILIES: dict[str, dict[str, Any]] = {  # what is theirs, beside what the sources of all families share
    "qwen2": {},
    "qwen3": {},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt2": {},
}
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards box and judge my vow of quartz\n"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """A run that a test opens tells the processes it might start, and must not tell those of the next test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    assert len(trained_tokenizer(lambda: [TEXT], 300, folder)) == 300
    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family that is supported by name."""
    return request.param


@pytest.fixture(scope="session")
def source_folder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`source_folder(family, tied=False, rows=300)`: a folder with tokenizer, config and random weights.

    Weights, norms and biases are wide enough for attention and predictions to be far from flat.
    """

    @cache
    def make(family: str = "qwen3", tied: bool = False, rows: int = 300) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
        config = AutoConfig.for_model(
            family,
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **FAMILIES.get(family, {}),
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            network = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("source") / f"{family}-{'tied' if tied else 'untied'}-{rows}"
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_denoiser(source_folder: Callable[..., Path]) -> Callable[..., Denoiser]:
    """`make_denoiser(family, tied, **options)`: a Denoiser on a source whose 300 rows are tokens, plus a mask row."""

    @cache
    def network(family: str, tied: bool) -> PreTrainedModel:
        source = Source(str(source_folder(family, tied)))
        config = source.config
        config.vocab_size = 301
        return build(config, source, attention.NAME)

    def make(family: str = "qwen3", tied: bool = False, **options) -> Denoiser:
        return Denoiser(copy.deepcopy(network(family, tied)), mask_id=300, token_ids=range(300), **options)

    return make


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Modules are compiled without generating code: here are the graphs that would have become some."""
    found, own = [], nn.Module.compile

    def as_it_is(graph: Any, _inputs: Any) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", lambda module: own(module, backend=as_it_is))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def products() -> type[TorchDispatchMode]:
    """`with products(columns) as made:` finds matrix products with so many columns, as tensors without values."""

    class Products(TorchDispatchMode):
        def __init__(self, columns: int) -> None:
            super().__init__()
            self.columns, self.found = columns, []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[1] == self.columns:
                self.found.append(out.to("meta"))
            return out

    return Products


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """`make_batch([[5, 9], [12]], length=16)`: rows of documents by their lengths, padded at the end.

    `prompts` and `starts` are by (row, document): tokens of the prompt, and the position at which the document goes on
    from an earlier row. An empty row is all padding. Tokens and uniforms are random, by `seed`.
    """

    def make(
        rows: list[list[int]],
        length: int | None = None,
        prompts: dict[tuple[int, int], int] | None = None,
        starts: dict[tuple[int, int], int] | None = None,
        vocab: int = 300,
        seed: int = 0,
    ) -> Batch:
        length = length or max(sum(row) for row in rows)
        generator = torch.Generator().manual_seed(seed)
        ids_BL = torch.randint(vocab, (len(rows), length), generator=generator)
        position_BL = torch.zeros(len(rows), length, dtype=torch.long)
        document_BL = (-1 - torch.arange(length)).repeat(len(rows), 1)
        maskable_BL = torch.zeros(len(rows), length, dtype=torch.bool)
        for b, row in enumerate(rows):
            first = 0
            for d, size in enumerate(row):
                here = slice(first, first + size)
                position_BL[b, here] = torch.arange(size) + (starts or {}).get((b, d), 0)
                document_BL[b, here] = d
                maskable_BL[b, here] = position_BL[b, here] >= (prompts or {}).get((b, d), 0)
                maskable_BL[b, first] = False
                first += size
        u_BL = torch.rand(len(rows), length, generator=generator)
        t_BL = 1 - torch.rand(len(rows), length, generator=generator)
        place_B = torch.tensor([n if row else -1 for n, row in enumerate(rows)])
        return Batch(ids_BL, position_BL, document_BL, maskable_BL, u_BL, t_BL, place_B)

    return make


@pytest.fixture(scope="session")
def plain_logits() -> Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]:
    """`plain_logits(denoiser, ids_S, position_S, mask_SS)`: [S, V] by transformers' own eager attention and causal LM.

    The same weights under an explicit mask, without a view, a backend or a ban on tokens.
    """

    def logits(denoiser: Denoiser, ids_S: Tensor, position_S: Tensor, mask_SS: Tensor) -> Tensor:
        network = AutoModelForCausalLM.from_config(copy.deepcopy(denoiser.network.config), attn_implementation="eager")
        network.load_state_dict(denoiser.network.state_dict())
        bias_11SS = torch.where(mask_SS, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            return network(input_ids=ids_S[None], position_ids=position_S[None], attention_mask=bias_11SS).logits[0]

    return logits


@pytest.fixture(scope="session")
def loss_and_gradients() -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """`loss_and_gradients(denoiser, batch, copies, pattern, ar_weight)`: a training step's loss and its gradients."""

    def compute(denoiser, batch, copies, pattern, ar_weight=0.0):
        masks = [mask_BL for mask_BL, _ in copies]
        view = pattern.lay_out(batch, masks, denoiser.mask_id, with_ar_copy=ar_weight > 0)
        scored = score(batch, view, copies, ar_weight)
        denoiser.zero_grad()
        loss = weighted_sum(denoiser(view, scored.index_N, scored.target_N), scored.weight_N)
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in denoiser.named_parameters()}

    return compute


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """`assert_same(a, b)`: two results of `loss_and_gradients` agree, tensor by tensor, to a relative error of 1e-5."""

    def check(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]], error: float = 1e-5) -> None:
        assert a[0] == pytest.approx(b[0], rel=error)
        assert a[1].keys() == b[1].keys()
        for name, gradient in b[1].items():
            assert gradient.norm() > 0, name
            assert (a[1][name] - gradient).norm() <= error * gradient.norm(), name

    return check


@pytest.fixture(scope="session")
def make_recipe(source_folder: Callable[..., Path]) -> Callable[..., Recipe]:
    """`make_recipe(RecipeClass, step=0, **options)`: a recipe with its network, at a step of a stand-in trainer."""

    def make(recipe_class: type[Recipe], step: int = 0, **options) -> Recipe:
        recipe = recipe_class(source=str(source_folder()), **options)
        recipe.configure_model()
        data = SimpleNamespace(row_length=16, seed=0)
        recipe._trainer = SimpleNamespace(global_step=step, accumulate_grad_batches=1, world_size=1, datamodule=data)
        return recipe

    return make


STEPS: dict[str, tuple[type[Recipe], dict[str, Any]]] = {
    "ar": (ArSource, {}),
    "full": (FullBidirectional, {}),
    "blocks": (BlockCausal, {"block_size": 4}),
    "views and an AR loss": (BlockCausal, {"block_size": 4, "context_rank": "causal", "ar_weight": 0.5, "views": 2}),
    "complementary": (ComplementaryMask, {"block_size": 4}),
    "activations computed anew": (ComplementaryMask, {"block_size": 4, "activation_checkpointing": True}),
    "a row's own rate": (BlockCausal, {"block_size": 4, "lr_scale": LrScale(mask_row=10.0)}),
}


@pytest.fixture(params=STEPS)
def any_recipe(request: pytest.FixtureRequest, make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """`any_recipe(**options)`: each kind of training step in turn, as `make_recipe` makes its recipe."""
    recipe_class, options = STEPS[request.param]
    return lambda **more: make_recipe(recipe_class, **options, **more)


@pytest.fixture(scope="session")
def validated() -> Callable[[Recipe, Batch], dict[str, float]]:
    """`validated(recipe, batch)`: the metrics of a validation on one batch."""

    def run(recipe: Recipe, batch: Batch) -> dict[str, float]:
        recipe.on_validation_epoch_start()
        with torch.no_grad():
            recipe.validation_step(batch, 0)
        return {name: metric.compute().item() for name, metric in recipe.metrics.items() if metric.update_called}

    return run


# Commands


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six text files."""
    folder = tmp_path_factory.mktemp("corpus")
    words = TEXT.split()[:13]
    for number in range(6):
        lines = (" ".join(words[(number + row + i) % len(words)] for i in range(9)) for row in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def row_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of all tests keep their tokenised rows."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def dlm(row_cache: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`dlm("fit", …, cwd=…)` in a process of its own; fails the test on failure."""

    def run(*words: str, cwd: Path, fails: bool = False, env: dict[str, str] | None = None):
        environment = {**os.environ, "XDG_CACHE_HOME": str(row_cache), "OMP_NUM_THREADS": "1", **(env or {})}
        command = [sys.executable, "-m", "dlm_lightning.cli", *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


class Said(NamedTuple):
    """What a command left behind on the terminal."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def typed(row_cache: Path) -> Callable[..., Said]:
    """`typed("fit", …, cwd=…)`: a command in this process, which spares five seconds of imports.

    Working directory, environment and import path are put back afterwards.
    """

    def run(*words: object, cwd: Path, env: dict[str, str] | None = None) -> Said:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(row_cache), **(env or {})}),
            mock.patch.object(sys, "path", [*sys.path]),
            mock.patch.object(warnings, "showwarning", warnings.showwarning),
        ):
            try:
                code = cli.main([str(word) for word in words])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Said(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def refused(typed: Callable[..., Said]) -> Callable[..., str]:
    """`refused("fit", …, cwd=…)`: the one sentence of a command that fails and leaves all files as they were."""

    def run(*words: object, cwd: Path) -> str:
        def files() -> dict[Path, bytes | None]:
            found = (path for path in cwd.rglob("*") if path.is_file() or path.parent.parent.name == "runs")
            return {path: path.read_bytes() if path.is_file() else None for path in found}

        before = files()
        said = typed(*words, cwd=cwd)
        assert said.code == 1, said
        assert "Traceback" not in said.out + said.err
        assert said.err.startswith("dlm: ") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
        assert files() == before
        return said.err.removeprefix("dlm: ").rstrip("\n")

    return run


@pytest.fixture(scope="session")
def small(source_folder: Callable[..., Path], corpus: Path) -> Callable[..., list[str]]:
    """Overrides that make a shipped recipe a matter of seconds."""

    def overrides(**more: object) -> list[str]:
        values = {
            "model.source": source_folder("qwen3", tied=True),
            "data.paths": f"[{corpus}]",
            "data.val_share": 0.2,
            "data.row_length": 24,
            "data.batch_size": 4,
            "data.val_rows": 6,
            "trainer.max_steps": 6,
            "trainer.val_check_interval": 4,
            "trainer.log_every_n_steps": 1,
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        return [f"{key}={value}" for key, value in values.items()]

    return overrides


@pytest.fixture
def finished(typed: Callable[..., Said], small: Callable[..., list[str]], tmp_path: Path) -> Path:
    """A finished run of `block_causal`, 6 steps, with its last checkpoint, in `<tmp_path>/done`."""
    said = typed(
        "fit",
        "block_causal",
        *small(trainer__callbacks="[{class_path: dlm_lightning.callbacks.checkpoints.Checkpoints}]"),
        "--run",
        "done",
        cwd=tmp_path,
    )
    assert said.code == 0, said.err
    return tmp_path / "done"
