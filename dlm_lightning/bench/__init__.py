"""`dlm bench`: how fast a training step is, beside frozen baselines and an AR step, always in one run and as a ratio.

A measurement is a folder with `bench.json`, which has every turn's seconds, and `bench.png`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from dlm_lightning.bench import show
from dlm_lightning.bench.arms import Arm, Step, arms, check, check_documents
from dlm_lightning.bench.needs import forward_tokens, needed_flops, peak_memory
from dlm_lightning.bench.record import JSON, Contest, Measured, Record, named
from dlm_lightning.bench.timing import WARM_UP, take_turns, wait_for
from dlm_lightning.peak_flops import peak_flops
from dlm_lightning.plan import prepare

log = logging.getLogger(__name__)
FOLDER = Path("runs/bench")
DOCUMENTS = "documents"  # grows like a key of a recipe


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    recipes, overrides: as of `dlm fit`; of a source only config and tokenizer are read. baselines: by name.
    turns: that are counted. documents: in each row. growth: a key, or `documents`, and the values to try.
    tflops: the device's peak; None takes the one that is known (see `peak_flops`).
    """

    recipes: Sequence[str]
    overrides: Sequence[str] = ()
    baselines: Sequence[str] = ()
    turns: int = 10
    documents: int = 1
    growth: tuple[str, Sequence[str]] | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        arms(self.baselines)
        if self.turns < 1:
            raise ValueError(f"--turns must be at least 1, not {self.turns}")
        if self.growth and self.growth[0] == DOCUMENTS and self.documents != 1:
            raise ValueError(f"--documents {self.documents} and --growth {DOCUMENTS} contradict each other")
        if self.documents < 1:
            raise ValueError(f"--documents must be at least 1, not {self.documents}")
        if self.tflops is not None and not 0 < self.tflops < float("inf"):
            raise ValueError(f"--tflops must be above 0 and finite, not {self.tflops}")


def bench(request: Request, out: str | None = None) -> Path:
    """Measure what is asked for, print the table, and return the folder with JSON and picture."""
    _folder(out)
    check_all(request)
    with _claimed(out) as folder:
        record = measure(request, keep=lambda record: record.save(folder))
    Console(highlight=False).print(show.tables(record))
    show.draw(record, folder / show.PICTURE)
    return folder


def check_all(request: Request) -> None:
    """Refuse what cannot be measured before anything is: every recipe at every value of what grows."""
    for value in request.growth[1] if request.growth else [None]:
        for recipe in request.recipes:
            overrides, documents = _grown(request, value)
            check_documents(documents, prepare(recipe, overrides, here=True).data.row_length)


@contextmanager
def _claimed(out: str | None) -> Iterator[Path]:
    """The measurement's folder, whose `bench.json` is there meanwhile, empty, so that no other takes the same.

    Where nothing was measured what was made is taken away again.
    """
    folder, made = _claim(out)
    try:
        yield folder
    except BaseException:
        if (folder / JSON).stat().st_size:
            log.info("%s holds what was measured until then", folder / JSON)
            raise
        (folder / JSON).unlink()
        for path in made:
            with suppress(OSError):  # another measurement is in it by now
                path.rmdir()
        raise


def _claim(out: str | None) -> tuple[Path, list[Path]]:
    """The folder, and what had to be made of its path, the innermost first."""
    folder = _folder(out)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON).touch(exist_ok=False)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():  # another measurement was faster
            return _claim(out)
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from error
    return folder, made


def measure(request: Request, keep: Callable[[Record], None] = lambda _: None) -> Record:
    """Every recipe, at every value of what grows; `keep` is given what there is after each."""
    record = Record(asdict(request), "", None, [])
    for value in request.growth[1] if request.growth else [None]:
        for recipe in dict.fromkeys(request.recipes):
            contest, device, peak = _contest(request, recipe, value)
            record = replace(record, device=named(device), peak=peak, contests=[*record.contests, contest])
            keep(record)
            gc.collect()  # a recipe and its trainer hold each other, and with them the network
    return record


def _contest(request: Request, recipe: str, value: str | None) -> tuple[Contest, torch.device, float | None]:
    """One recipe's arms, and the device with its peak."""
    overrides, documents = _grown(request, value)
    prepared = prepare(recipe, overrides, here=True)
    step, contestants = Step(prepared, documents), arms(request.baselines)
    began = time.perf_counter()
    losses = {arm.name: float(step(arm)) for arm in contestants}
    check(losses)
    seconds_once, times = time.perf_counter() - began, WARM_UP + request.turns
    log.info("%s: %d arms, each once in %.1f s, now %d times", prepared.name, len(losses), seconds_once, times)
    peak = request.tflops * 1e12 if request.tflops else peak_flops(step.device, prepared.machine.precision)
    steps = {arm.name: partial(step, arm) for arm in contestants}
    seconds = take_turns(steps, request.turns, wait=wait_for(step.device))
    measured = [_measured(step, arm, seconds[arm.name], losses[arm.name], peak is not None) for arm in contestants]
    return Contest(prepared.name, value, prepared.machine.precision, measured), step.device, peak


def _grown(request: Request, value: str | None) -> tuple[list[str], int]:
    """The overrides, and the documents of a row, at a value of what grows."""
    if request.growth is None:
        return list(request.overrides), request.documents
    key = request.growth[0]
    if key == DOCUMENTS:
        return list(request.overrides), int(value or 1)
    return [*request.overrides, f"{key}={value}"], request.documents


def _measured(step: Step, arm: Arm, seconds: list[float], loss: float, with_flops: bool) -> Measured:
    return Measured(
        arm.name,
        seconds,
        data=step.batch.ids_BL.numel(),
        scored=len(arm.shown(step.recipe, step.batch)[1].index_N),
        forward=forward_tokens(step, arm),
        memory=peak_memory(step, arm),
        flops=needed_flops(step, arm) if with_flops else None,
        loss=loss,
    )


def growth(words: str) -> tuple[str, list[str]]:
    """`KEY=V,V,…` as a key, or `documents`, and its values, which are numbers because they become an axis."""
    key, _, values = words.partition("=")
    found = [value.strip() for value in values.split(",")]
    if not all(found):
        raise ValueError(f"--growth {words} needs values, as in --growth data.row_length=512,1024")
    if key != DOCUMENTS and not key.startswith(("model.", "data.", "trainer.")):
        raise ValueError(f"--growth {key}: what grows is a key of a recipe, such as data.row_length, or {DOCUMENTS}")
    for value in found:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--growth {key}: {value} is no whole number above 0")
    return key, sorted(dict.fromkeys(found), key=int)


def _folder(out: str | None) -> Path:
    """The folder of a measurement: a new number below `runs/bench`, or a named one that holds nothing."""
    if out is None:
        numbers = [int(path.name) for path in FOLDER.glob("*") if path.name.isdigit()]
        return FOLDER / str(max(numbers, default=0) + 1)
    folder = Path(out).expanduser()
    if not out.strip() or folder.is_file():
        raise ValueError(f"--out needs the name of a folder, not {out!r}")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"--out {out} already holds something; name a new folder")
    return folder
