"""`dlm drift A B`: how far the weights of B have moved from those of A, two checkpoints of one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dlm_lightning import checkpoint, lora, manifest
from dlm_lightning.callbacks.weight_drift import COLUMNS, TABLE, picture
from dlm_lightning.callbacks.weight_drift import SCHEMA as IN_A_RUN
from dlm_lightning.drift import METRICS, Weights, between, by_group, pool, rows
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore
from dlm_lightning.runs import CONFIG
from dlm_lightning.source import SAVED_MODEL, Source

SCHEMA = IN_A_RUN.remove(IN_A_RUN.get_field_index("step"))


@dataclass(frozen=True)
class Held:
    """Weights in memory, by the names that a Hugging Face folder has; see `drift.Weights`."""

    tensors: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        """All names, those of tied weights once."""
        return [*self.tensors]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor."""
        return self.tensors[name][start:stop]

    def rows(self, name: str) -> int:
        """The length of a tensor's first dimension."""
        return len(self.tensors[name])


def drift(before: str, after: str, out: str | None = None) -> None:
    """Print the drift of `after` from `before`, by groups of parameters; with `out` also keep a table and a map.

    Each is a hub id, a Hugging Face folder, a run, or one checkpoint of a run, sharded or not; adapters are merged.
    Raises ValueError if they are not of one model, FileNotFoundError for what is not there.
    """
    quiet()
    folder = Path(out).expanduser() if out else None
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--out {out} already holds something; name a new folder")
    old, new = (opened(place) for place in (before, after))
    drifts = between(old, new)
    if not drifts:
        raise ValueError(f"{before} and {after} have no weights of the same name")
    console = Console(highlight=False)
    groups = by_group(drifts)
    groups = {group: groups[group] for group in ("embedding", *COLUMNS, "head") if group in groups}
    console.print(drift_table(groups | {"all": pool(drifts)}, f"weight drift of {after} from {before}"))
    if alone := sorted(set(old.names) ^ set(new.names)):
        console.print(f"left out: {len(alone)} that only one of them has, {alone[0]} the first")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows(drifts)], SCHEMA), folder / TABLE)
        picture(drifts, "Drift between two checkpoints", folder / "drift.png")
        console.print(str(folder))


def drift_table(groups: dict[str, dict[str, float]], title: str) -> Table:
    """The metrics of groups of parameters as a table for the terminal."""
    found = Table("module group", *METRICS, title=title, title_justify="left")
    for group, values in groups.items():
        found.add_row(group, *(f"{values[name]:.3g}" if name in values else "" for name in METRICS))
    return found


def opened(place: str) -> Weights:
    """The weights at a place."""
    if not place.strip():
        raise ValueError("drift is between two places, and one of them has no name")
    path = Path(place).expanduser()
    if (path / checkpoint.STATE).exists():
        manifest.verify(path)
        return _held(str(path.parents[1]), path)
    if (path / CONFIG).is_file() and not (path / SAVED_MODEL / "config.json").is_file():
        return _held(place, None)
    try:
        return Source(place)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(str(error).removeprefix("model.source: ")) from error


def _held(run: str, path: Path | None) -> Held:
    """The weights of a run's checkpoint, by default its newest."""
    _, recipe, _ = restore(run, path=path)
    network = recipe.denoiser.network
    merged = lora.merged(network, dict(network.state_dict()))
    return Held({name: merged[name] for name, _ in lora.named_parameters(network)})
