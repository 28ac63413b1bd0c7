"""The commands of `dlm` by their names; each is given the words behind its name, and reads them without torch."""

from collections.abc import Callable

from dlm_lightning.commands.measures import bench, compare, drift, evaluate, report
from dlm_lightning.commands.models import consolidate, export, generate, import_model
from dlm_lightning.commands.recipes import list_all, plan, probe, show
from dlm_lightning.commands.runs import fit, replay, resume, summary, validate

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": list_all,
    "probe": probe,
    "show": show,
    "plan": plan,
    "bench": bench,
    "fit": fit,
    "resume": resume,
    "validate": validate,
    "replay": replay,
    "summary": summary,
    "generate": generate,
    "eval": evaluate,
    "compare": compare,
    "report": report,
    "drift": drift,
    "consolidate": consolidate,
    "export": export,
    "import": import_model,
}
