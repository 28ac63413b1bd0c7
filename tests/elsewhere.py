"""All that is computed, on a device that is not the host: it has values, and refuses tensors of the host.

As a GPU does, which takes numbers for pointwise operations; but one takes indices of the host, too, and waits for them.

`test_elsewhere.py` runs this file in a process of its own, since what a process has registered as a device stays.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dlm_lightning.attention import flex
from dlm_lightning.bench.arms import arms
from dlm_lightning.decode.decoder import decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.decode.reuse import Causal, Delayed, Greedy, Nothing, Prefix, SubBlock
from dlm_lightning.decode.sampling import Sampling
from dlm_lightning.decode.selector import Threshold
from dlm_lightning.decode.stopper import Stopper
from dlm_lightning.drift import measure
from dlm_lightning.gradient_noise import gradient_noise
from dlm_lightning.likelihood import Blocks, bound
from dlm_lightning.recipes.block_causal import BlockCausal
from dlm_lightning.recipes.complementary_mask import ComplementaryMask
from dlm_lightning.sight import check_readout, check_sight
from dlm_lightning.source import Source
from dlm_lightning.view import Batch, Pattern, sees

NAME, HOST = "elsewhere", torch.device("cpu")


class Module(backend_registration._DummyBackendModule):
    """What torch asks of a device, which has no generator of its own."""

    def get_rng_state(self, _device: Any = None) -> Tensor:
        return torch.zeros(1)

    def set_rng_state(self, _state: Tensor, _device: Any = None) -> None: ...

    def is_available(self) -> bool:
        return False  # to whom looks for one

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]  # which nothing here is computed in


backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
THERE = torch.device(NAME, 0)


class There(torch.Tensor):
    """A tensor on the device. Its values are one of the host, which nobody else is given."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        like: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=THERE, **like)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return There, (self.held,)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


WHOLE = {getattr(torch.ops.aten, name) for name in ("cat", "stack", "index_select", "gather", "scatter", "mm", "equal")}


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation where its tensors are; RuntimeError if they are not all in one place, numbers left out."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    host = [tensor for tensor in tensors if not isinstance(tensor, There)]
    if there and not copies and any(tensor.dim() or function.overloadpacket in WHOLE for tensor in host):
        raise RuntimeError(f"{function}: tensors are on the host and on the device")
    out = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    asked = kwargs.get("device")
    if function.overloadpacket == torch.ops.aten.copy_:
        stays = isinstance(args[0], There)
    else:
        stays = bool(there) if asked is None else torch.device(asked).type == NAME
    known = {id(tensor.held): tensor for tensor in there}  # of what is computed in place
    return tree_map(lambda x: known.get(id(x), There(x)) if isinstance(x, Tensor) else x, out) if stays else out


def on_host(leaf: Any) -> Any:
    if isinstance(leaf, There):
        return leaf.held
    return HOST if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


class Dispatch(TorchDispatchMode):
    """For what is made on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """For what does not reach the dispatcher."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = bool(args) and isinstance(args[0], There)
        if there and function == torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if there and function == torch.Tensor.__getitem__:  # torch sends lists on by itself
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            at = tuple(torch.tensor(index).to(THERE) if isinstance(index, list) else index for index in at)
            return function(args[0], at)
        if there and function == torch.Tensor.numpy:
            raise TypeError("a tensor of the device is no array")
        made = function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or HOST).type == NAME
        if made:
            return function(*args, **{**kwargs, "device": HOST}).to(THERE)
        if there and function == torch.Tensor.new_tensor and "device" not in kwargs:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(THERE)
        return function(*args, **kwargs)


class Elsewhere(Accelerator):
    """The device to Lightning."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[torch.device]:
        return [THERE]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [THERE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


AcceleratorRegistry.register(NAME, Elsewhere, description="a device that is not the host")


@contextlib.contextmanager
def device() -> Iterator[torch.device]:
    with Functions(), Dispatch():
        yield THERE


def sent(batch: Batch) -> Batch:
    return Batch(*(tensor.to(THERE) for tensor in batch))


@pytest.fixture
def batch(make_batch):
    return make_batch([[9, 7], [13], [5, 5], []], length=16, prompts={(1, 0): 4})


def test_it_refuses_what_a_gpu_refuses():
    with device():
        there = torch.ones(3, device=THERE)
        assert (there + torch.tensor(2.0)).device == torch.tensor([1], device=THERE).device == THERE
        assert there.cpu().device == HOST and (there * 2).sum().item() == 6 and there.tolist() == [1, 1, 1]
        for wrong in (
            lambda: there + torch.ones(3),
            lambda: torch.ones(3) + there,
            lambda: there[torch.tensor([0])],
            lambda: torch.stack([there.sum(), torch.tensor(1.0)]),
            lambda: there.index_select(0, torch.tensor(0)),
        ):
            with pytest.raises(RuntimeError, match="on the host and on the device"):
                wrong()
        with pytest.raises(TypeError):
            there.numpy()


def test_a_step_and_a_validation(any_recipe, batch, validated):
    recipe = any_recipe(attention="dense")
    recipe._trainer.max_steps = 10
    logged: dict[str, Any] = {}
    recipe.log = lambda key, value, **_: logged.update({key: value})
    with device():
        recipe.to(THERE)
        optimizer = recipe.configure_optimizers()["optimizer"]
        loss = recipe.training_step(batch, 0)
        loss.backward()
        recipe.on_before_optimizer_step(optimizer)
        optimizer.step()
        recipe.settle()
        assert loss.device == logged["train/loss"].device == THERE
        assert validated(recipe, sent(batch))


@pytest.mark.parametrize("recipe_class", [BlockCausal, ComplementaryMask])
def test_every_arm_of_a_benchmark(recipe_class, make_recipe, batch):
    recipe = make_recipe(recipe_class, block_size=4, attention="dense")
    with device():
        recipe.to(THERE)
        for arm in arms(["peers", "fair"]):
            arm.loss(recipe, batch if arm.from_host else sent(batch)).backward()


def test_what_is_measured(make_recipe, batch, source_folder):
    recipe = make_recipe(BlockCausal, block_size=4, attention="dense")
    with torch.no_grad():
        for parameter in recipe.denoiser.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    source = Source(str(source_folder()))

    def found(batch: Batch) -> list[Any]:
        noise = gradient_noise(recipe, [batch, batch], 2)
        with torch.no_grad():
            bounds = [bound(recipe.denoiser, batch, Blocks(size), 0).share_BL.sum().item() for size in (1, 4)]
        drifts = [x for drift in measure(recipe.denoiser.network, source) for x in astuple(drift) if type(x) is float]
        return [*noise, *bounds, *drifts, check_sight(recipe.denoiser, recipe.pattern)]

    here = found(batch)
    with device():
        recipe.to(THERE)
        assert check_readout(recipe.denoiser) < 1e-5
        assert found(sent(batch)) == pytest.approx(here, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("pattern", [Pattern(16, "clean"), Pattern(None)], ids=str)
def test_the_block_mask_of_flexattention(pattern, window, make_batch):
    batch = make_batch([[200], [90, 100]], length=200)
    view = pattern.lay_out(batch, [batch.maskable_BL], 300)
    here = flex.block_mask(view, sees, window)
    with device():
        there = flex.block_mask(view.to(THERE), sees, window)
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices"):
            assert getattr(there, name).tolist() == getattr(here, name).tolist()


CACHES = [Nothing(), Prefix(), Causal(), SubBlock(), Delayed(), Greedy()]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: type(cache).__name__)
def test_decoding(cache, static, temperature, make_denoiser):
    pattern = Pattern(4, "clean", "causal" if isinstance(cache, Causal) else "block")
    denoiser = make_denoiser(pattern=Pattern(None) if isinstance(cache, Delayed | Greedy) else pattern, backend="dense")
    sampling = Sampling(temperature=temperature)
    plan = Plan(selector=Threshold(0.9), cache=cache, stopper=Stopper(9), sampling=sampling)
    prompts = [[17, 250, 3, 99, 41, 8], [5], [17, 250, 3]]
    here = decode(denoiser, prompts, plan, static=static)
    with device():
        denoiser.to(THERE)
        there = decode(denoiser, prompts, plan, static=static)
    assert [row.ids for row in there.rows] == [row.ids for row in here.rows]


def metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [
        {key: value for key, value in row.items() if not key.startswith(("speed", "drift/seconds"))} for row in rows
    ]


@pytest.mark.parametrize("recipe", ["block_causal", "complementary_mask", "full_bidirectional"])
def test_commands(recipe, typed, small, tmp_path):
    """A whole run with all of its callbacks, measured and asked: the same numbers and the same text as on the host."""
    texts = []
    for name in ("cpu", NAME):
        words = small(model__attention="dense", trainer__accelerator=name, trainer__devices=1)
        commands = [["fit", recipe, *words, "--run", name], ["validate", name], ["eval", name]]
        with device() if name == NAME else contextlib.nullcontext():
            for command in [*commands, ["generate", name, "--prompt", "the quick", "--device", name]]:
                said = typed(*command, cwd=tmp_path)
                assert said.code == 0, said.err
        texts.append(said.out)
    assert texts[0] == texts[1] and len(texts[0]) > 20
    here, there = metrics(tmp_path / "cpu"), metrics(tmp_path / NAME)
    assert len(here) == len(there) > 6
    for a, b in zip(here, there, strict=True):
        assert b == pytest.approx(a, rel=1e-3, nan_ok=True)
