"""A training step on fake tensors: nothing is computed, every byte and FLOP is counted and shared out among devices.

Shapes: B rows, L tokens per copy, N scored tokens.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlm_lightning import attention, readout
from dlm_lightning.allocator import Allocator
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.flops import FlopCounter
from dlm_lightning.module import Recipe
from dlm_lightning.noise import Masked
from dlm_lightning.source import decoder_layers
from dlm_lightning.view import Batch

SETTLING = 4  # steps after which a CPU's malloc holds hardly more than before


class Moment(NamedTuple):
    """Bytes that are alive at the same time beside weights and optimizer state."""

    gradients: int = 0
    rest: int = 0


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes on a device that holds everything, in bytes and FLOPs.

    weights, gradients, optimizer: whole, of the parameters, of those that are trained, of AdamW's moments.
    activations: what is alive between a forward pass and its backward pass.
    passes, update: the fullest moment of forward and backward, and of the optimizer's step.
    allocator: what a CPU's malloc held at most, with what it keeps of freed blocks; 0 on a GPU, or if it does not tell.
    forward, computed: FLOPs of a micro-batch's forward pass, and of forward and backward with recomputation.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    passes: Moment
    update: Moment
    allocator: int
    forward: int
    computed: int


class Ledger(TorchDispatchMode):
    """Follows each storage that an operation makes from birth to death; `fullest` is the moment with most bytes.

    `held` bytes are those that are there at any time; `gradients` is told by `watch`. An allocator is asked for each.
    """

    def __init__(self, allocator: Allocator | None = None) -> None:
        super().__init__()
        self.allocator = allocator
        self.alive = self.held = self.gradients = 0
        self.fullest = Moment()
        self._size: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        rest = self.alive - self.held - self.gradients
        if rest + self.gradients > sum(self.fullest):
            self.fullest = Moment(self.gradients, rest)
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._size:
            self._size[key] = storage.nbytes()
            self.alive += storage.nbytes()
            if self.allocator:
                self.allocator.take(key, storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive -= self._size.pop(key)
        if self.allocator:
            self.allocator.give_back(key)

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Tell gradients from the rest as soon as they are accumulated.

        Then cycles are broken as well: what activation checkpointing recomputes is left in one, because torch ends the
        recomputation by an exception whose traceback, through this mode, holds tensors.
        """

        def accumulated(_: Tensor) -> None:
            gc.collect()
            self.gradients = nbytes(p.grad for p in parameters)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(accumulated)


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind tensors, each once; what is no tensor has none."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def rehearse(
    recipe: Recipe,
    batch: Batch,
    copies: Sequence[Masked],
    scored: int,
    accumulate: int = 1,
    gpu: bool = False,
) -> Rehearsal:
    """Build the recipe's network on fake tensors and make optimizer steps with it: two, and on a CPU a few more.

    Args:
        recipe: with a trainer, whose precision counts, and without a network yet; its weights are random ones, so that
            none are read.
        batch: a micro-batch of real tensors, and `copies` its masks; the values do not matter.
        scored: how many tokens are scored.
        accumulate: micro-batches per optimizer step; above 1, gradients stay during the passes.
        gpu: whether it is planned for a GPU, where no malloc is asked.

    Raises ValueError for a network whose shapes depend on what it computes.
    """
    recipe.pretrained = False
    plan = _attention(recipe, batch, copies)
    allocator = None if gpu else Allocator()
    gc.freeze()  # what is there already makes no cycles with the rehearsal, and need not be looked at again and again
    try:
        head = _head_of_a_gpu() if gpu else nullcontext()
        with head, FakeTensorMode(allow_non_fake_inputs=True) as fake, Ledger(allocator) as ledger:
            return _rehearse(recipe, _Faked(fake, batch, copies, scored), plan, accumulate, ledger)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"model: {type(recipe).__name__} cannot be planned: what it computes decides a shape ({error})"
        ) from error
    finally:
        gc.unfreeze()
        if allocator:
            allocator.close()


def _attention(recipe: Recipe, batch: Batch, copies: Sequence[Masked]) -> attention.Plan:
    """Who sees whom, by the real coordinates: what is skipped depends on them."""
    plan = attention.plan(recipe.show(batch, copies, recipe.pattern), recipe.predicate, backend=recipe.backend)
    if isinstance(plan, attention.split.Plan):
        for window in {None, getattr(recipe.model_config, "sliding_window", None)}:
            plan.lay_out(window)
    return plan


class _Faked:
    """A micro-batch of fake tensors."""

    def __init__(self, fake: FakeTensorMode, batch: Batch, copies: Sequence[Masked], scored: int) -> None:
        self.batch = Batch(*(fake.from_tensor(tensor) for tensor in batch))
        self.copies = [Masked(*(fake.from_tensor(tensor) for tensor in copy)) for copy in copies]
        self.index_N = torch.zeros(scored, dtype=torch.long)
        self.weight_N = torch.zeros(scored)


@contextmanager
def _head_of_a_gpu() -> Iterator[None]:
    """As many logits at a time as on a GPU: fake tensors are said to be on a CPU."""
    own = readout.AT_A_TIME["cpu"]
    readout.AT_A_TIME["cpu"] = readout.AT_A_TIME["cuda"]
    try:
        yield
    finally:
        readout.AT_A_TIME["cpu"] = own


@contextmanager
def _converted_anew() -> Iterator[None]:
    """Modules converted by `to`, as peft's adapters are, get new parameters: torch cannot swap fake ones in place."""

    def apply(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
        for inner in module.modules() if recurse else [module]:
            for name, p in inner._parameters.items():
                if p is not None:
                    inner._parameters[name] = nn.Parameter(convert(p.detach()), p.requires_grad)
            for name, buffer in inner._buffers.items():
                inner._buffers[name] = None if buffer is None else convert(buffer)
        return module

    own: Any = nn.Module._apply
    nn.Module._apply = apply  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


def _rehearse(recipe: Recipe, faked: _Faked, plan: attention.Plan, accumulate: int, ledger: Ledger) -> Rehearsal:
    with _converted_anew():
        recipe.configure_model()
    precision = recipe.trainer.precision_plugin  # not before: building the network may settle it
    denoiser = recipe.denoiser.train()
    denoiser.plan = lambda *_: plan  # type: ignore[method-assign]
    optimizer = recipe.configure_optimizers()["optimizer"]
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    ledger.watch(trained)
    ledger.held = nbytes(denoiser.parameters())
    activations = forward = computed = 0

    def passes(first: bool) -> None:
        """A micro-batch as Lightning makes it: gradients are dropped between the passes of a step's first one."""
        nonlocal activations, forward, computed
        before = ledger.alive
        with FlopCounter() as counter:
            with precision.forward_context():
                view = recipe.show(faked.batch, faked.copies, recipe.pattern)
                loss, _ = denoiser(view, faked.index_N, faked.index_N, faked.weight_N)
            activations, forward = ledger.alive - before, counter.forward
            if first:
                optimizer.zero_grad()
                ledger.gradients = 0
            loss.backward()
            computed = counter.get_total_flops()

    def step() -> tuple[Moment, Moment]:
        """A step, and the fullest moments of its passes and of its update."""
        ledger.fullest = Moment()
        for micro_batch in range(min(accumulate, 2)):
            passes(first=micro_batch == 0)
        in_passes, ledger.fullest = ledger.fullest, Moment()
        optimizer.step()
        return in_passes, ledger.fullest

    step()  # makes the optimizer's state, which every later step finds
    state = [value for values in optimizer.state.values() for value in values.values()]
    ledger.held += nbytes(state)
    in_passes, update = step()
    for _ in range(SETTLING if ledger.allocator else 0):
        step()
    return Rehearsal(
        weights=nbytes(denoiser.parameters()),
        gradients=nbytes(p.grad for p in trained),
        optimizer=nbytes(state),
        activations=activations,
        passes=in_passes,
        update=update,
        allocator=ledger.allocator.most if ledger.allocator else 0,
        forward=forward,
        computed=computed,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: each part whole, and as much of it as is there at the fullest moment, `when`."""

    parts: dict[str, tuple[int, int]]
    when: str

    @property
    def peak(self) -> int:
        return sum(at_peak for _, at_peak in self.parts.values())


def per_device(done: Rehearsal, strategy: str, devices: int, denoiser: Denoiser) -> Memory:
    """A rehearsal on one device, shared out as the strategy does.

    DDP keeps a second copy of the gradients, its buckets. FSDP2 divides weights, gradients and optimizer state; whole
    at a time are what lies outside the layers, and two layers, the one at work and the next, with the gradients of one.
    What malloc holds beyond the fullest moment is freed memory that it keeps.
    """
    shards = devices if strategy == "fsdp2" else 1
    buckets = done.gradients if strategy.startswith("ddp") else 0
    whole = _gathered(denoiser) if strategy == "fsdp2" else 0
    fullest = done.weights + done.optimizer + max(sum(done.passes), sum(done.update))
    freed = max(0, done.allocator - fullest) // shards
    moments = {
        "in the forward or backward pass": (done.passes, whole, 1),
        "in the optimizer's step": (done.update, 0, shards),
    }

    def memory(when: str) -> Memory:
        moment, gathered, share = moments[when]
        rest = moment.rest // share
        kept = min(rest, done.activations) if share == 1 and moment is done.passes else 0
        parts = {
            "weights": (done.weights // shards, done.weights // shards),
            "gradients": ((done.gradients + buckets) // shards, (moment.gradients + buckets) // shards),
            "optimizer state": (done.optimizer // shards, done.optimizer // shards),
            "activations": (done.activations, kept),
            "logits and temporaries": (rest - kept, rest - kept),
        }
        if whole:
            parts["gathered by FSDP2"] = (whole, gathered)
        if freed:
            parts["freed, kept by malloc"] = (freed, freed)
        return Memory(parts, when)

    return max((memory(when) for when in moments), key=lambda memory: memory.peak)


def _gathered(denoiser: Denoiser) -> int:
    """Bytes that FSDP2 has whole at a time."""
    split = [list(layer.parameters()) for layer in decoder_layers(denoiser.network)]
    inside = {id(p) for parameters in split for p in parameters}
    outside = [p for p in denoiser.parameters() if id(p) not in inside]
    largest = max(split, key=nbytes)
    gradients = nbytes(p for p in outside + largest if p.requires_grad)
    return nbytes(outside) + 2 * nbytes(largest) + gradients
