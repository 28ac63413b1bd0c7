"""The command line. It imports no torch until a command needs it."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import util
from itertools import takewhile, zip_longest
from pathlib import Path
from textwrap import wrap

from dlm_lightning import __version__, catalog, interruption, runs
from dlm_lightning.errors import sentence

FIT_HELP = """
  dlm fit block_causal                                    a shipped recipe by name …
  dlm fit mine.yaml model.block_size=32 --run runs/mine   … or a YAML, with overrides and a folder of one's own

key=value stands for LightningCLI's --key=value; all of its options work:
  --print_config            the resolved configuration, then stop
  --help, --model.help CLASS, --data.help CLASS   what can be set
  --ckpt_path DIR           start a new run from a checkpoint, such as runs/block_causal/1/checkpoints/step=100
"""
PRECISIONS = ("32-true", "bf16-true")  # in which weights are decoded with
PATIENCE = 10  # seconds that a rank which failed leaves to the first one of its machine, to say why


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors become one sentence on stderr and exit code 1 (2 for a wrong command line)."""
    warnings.showwarning = lambda message, *_: print(f"dlm: {message}", file=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["fit"], ["resume"]):
        interruption.hold()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads on, as with `dlm list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("dlm: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("DLM_DEBUG") == "1":
            raise
        if runs.is_first_of_node() or _joined():
            print(f"dlm: {sentence(error)}", file=sys.stderr)
        else:  # a launcher ends all ranks when one has ended
            interruption.outlive(os.getppid(), PATIENCE)
        return 1


def _joined() -> bool:
    """Whether the ranks have met; until then all of a machine fail alike."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["fit"]:
        return _fit(argv[1:])
    if argv[:1] == ["replay"]:
        return _replay(argv[1:])
    if argv[:1] == ["generate"]:
        return _generate(argv[1:])
    if argv[:1] == ["eval"]:
        return _eval(argv[1:])
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    parser = argparse.ArgumentParser(prog="dlm", description="Turn autoregressive language models into diffusion ones.")
    parser.add_argument("--version", action="version", version=f"dlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="recipes, data modules and callbacks, and where each comes from")
    commands.add_parser("fit", help="train a recipe; `dlm fit --help` says more")
    for name, about in (
        ("validate", "validate a run's newest checkpoint"),
        ("summary", "a conversion's tables: NELBO, drift, a continuation, files"),
    ):
        commands.add_parser(name, help=about).add_argument("run", metavar="RUN", help="a run folder")
    commands.add_parser("generate", help="continue prompts with a run's model", add_help=False)
    commands.add_parser("eval", help="measure all that runs are compared by, and tasks", add_help=False)
    commands.add_parser("compare", help="train several recipes with the same work, and compare", add_help=False)
    commands.add_parser("bench", help="time a recipe's step beside baselines and an AR step", add_help=False)
    reporting = commands.add_parser("report", help="runs side by side: report.html and report.md")
    reporting.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or a comparison's folder")
    reporting.add_argument("--out", metavar="DIR", help="a folder; default that of a comparison, or this one")
    commands.add_parser("replay", help="make one step of a run again and say what it gave", add_help=False)
    resume = commands.add_parser("resume", help="continue a run from its newest complete checkpoint")
    resume.add_argument("run", metavar="RUN", help="a run folder")
    resume.add_argument(
        "overrides", metavar="key=value", nargs="*", help="for this time only, such as trainer.devices=2"
    )
    consolidate = commands.add_parser("consolidate", help="a run's newest checkpoint as a Hugging Face folder")
    consolidate.add_argument("run", metavar="RUN", help="a run folder")
    consolidate.add_argument("--out", metavar="DIR", help="a new folder; default RUN/model")
    importing = commands.add_parser("import", help="a diffusion model that was trained elsewhere, as a run")
    importing.add_argument(
        "source", metavar="FOLDER", help="a Hugging Face folder or hub id: ours, SDAR, Fast-dLLM v2, Dream, LLaDA"
    )
    importing.add_argument("overrides", metavar="key=value", nargs="*", help="what the folder does not state")
    importing.add_argument("--run", metavar="DIR", help="the run folder; default runs/<folder>/<number>")
    export = commands.add_parser("export", help="a run's newest weights as a folder for other tools")
    export.add_argument("run", metavar="RUN", help="a run folder")
    export.add_argument("out", metavar="OUT", help="a new folder")
    export.add_argument(
        "--as",
        dest="form",
        choices=["hf", "ar", "sdar", "fast_dllm_v2"],
        default="hf",
        help="hf (default): a diffusion model with the code that decodes it on plain transformers; ar: a causal model; "
        "sdar, fast_dllm_v2: the layouts that engines and other code know by these names",
    )
    drift = commands.add_parser("drift", help="how far the weights of one checkpoint are from those of another")
    places = "a hub id, a Hugging Face folder, a run, or one of its checkpoints"
    drift.add_argument("before", metavar="A", help=places)
    drift.add_argument("after", metavar="B", help="what has moved; any of these, too")
    drift.add_argument("--out", metavar="DIR", help="a new folder for drift.parquet and drift.png")
    probe = commands.add_parser("probe", help="whether a source converts, and what it is, before anything is trained")
    probe.add_argument("source", metavar="SOURCE", help="a hub id, a local folder, or a run folder")
    probe.add_argument(
        "overrides", metavar="key=value", nargs="*", help="as of a recipe, such as data.paths='[my/texts]'"
    )
    show = commands.add_parser("show", help="draw a recipe's attention pattern: who sees whom")
    show.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a YAML file")
    show.add_argument("overrides", metavar="key=value", nargs="*")
    show.add_argument("--out", metavar="PNG", help="where the picture goes; default <recipe>.png")
    plan = commands.add_parser("plan", help="what a recipe will take: parameters, memory, tokens, FLOPs")
    plan.add_argument("recipe", metavar="RECIPE", help="a recipe's name or a YAML file")
    plan.add_argument("overrides", metavar="key=value", nargs="*")
    args, rest = parser.parse_known_args(argv)
    if any("=" not in word or word.startswith("-") or "overrides" not in args for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value behind an option
        args.overrides += rest
    if args.command == "list":
        return _list()
    if args.command == "probe":
        from dlm_lightning.probe import probe as run_probe

        run_probe(args.source, args.overrides)
        return 0
    if args.command == "report":
        from dlm_lightning.report import report

        print(report(args.runs, args.out))
        return 0
    if args.command == "plan":
        from dlm_lightning import plan as planning

        planning.show(args.recipe, args.overrides)
        return 0
    if args.command == "consolidate":
        from dlm_lightning.consolidate import consolidate as gather

        print(gather(args.run, args.out))
        return 0
    if args.command == "import":
        from dlm_lightning.importing import import_model

        print(import_model(args.source, args.overrides, args.run))
        return 0
    if args.command == "export":
        from dlm_lightning.export import export as give

        print(give(args.run, args.out, args.form))
        return 0
    if args.command == "drift":
        from dlm_lightning.drift_between import drift as measure

        measure(args.before, args.after, args.out)
        return 0
    if args.command == "show":
        from dlm_lightning.picture import show as draw

        print(draw(args.recipe, args.overrides, args.out))
        return 0
    if args.command == "summary":
        from dlm_lightning.summary import summarize

        summarize(args.run)
        return 0
    from dlm_lightning import training

    if args.command == "resume":
        return _report(training.resume(args.run, args.overrides))
    return _report(training.validate(args.run))


def _fit(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dlm fit",
        usage="dlm fit RECIPE [key=value …] [--run DIR] [--ckpt_path DIR] [LightningCLI options]",
        description="Train a recipe in a new run folder.",
        epilog=FIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--run", metavar="DIR", help="the run folder; default runs/<recipe>/<number>")
    parser.add_argument("--ckpt_path", metavar="DIR", help="a checkpoint of the same recipe to start from")
    args, words = parser.parse_known_args(argv)
    recipe = next((word for word in words if not word.startswith("-") and "=" not in word), None)
    if recipe is None and {"--help", "-h"} & set(words):
        parser.print_help()
        return 0
    if recipe is None:
        parser.error("which recipe? `dlm list` shows all")
    words.remove(recipe)
    catalog.find(recipe)  # a wrong name is answered before seconds of imports
    from dlm_lightning import training

    return _report(training.fit(recipe, words, args.run, args.ckpt_path))


def _replay(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dlm replay", description="Make one step of a run again and say what it gave."
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, which stays as it is")
    parser.add_argument("--step", metavar="N", type=int, required=True, help="which step, counted from 1")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="such as trainer.devices=1 trainer.strategy=auto"
    )
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning import replay

    replay.show(args.run, args.step, args.overrides)
    return 0


def _generate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dlm generate",
        usage="dlm generate RUN [--prompt TEXT | --file PATH | --jsonl PATH] [--plan PLAN] [key=value …] [options]",
        description="Continue prompts with the model of a run's newest checkpoint; without one, stdin is the prompt.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    given.add_argument("--file", metavar="PATH", help="a text file that is the prompt")
    given.add_argument("--jsonl", metavar="PATH", help='lines of {"prompt": …} or {"messages": […]}; - is stdin')
    parser.add_argument("--out", metavar="PATH", help="a new file for the text, or for the lines of --jsonl")
    parser.add_argument("--plan", metavar="PLAN", help="a decoder: a YAML, or a name of `dlm list`; default by pattern")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--batch", metavar="N", type=int, default=8, help="prompts at a time; default 8")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1; default a GPU if there is one")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the weights; default 32-true"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network first: for many prompts")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of the plan, such as selector.threshold=0.8")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.generate import generate, text_of

    if not args.jsonl and not args.prompt:
        args.prompt = [text_of(args.file or "-")]
    prompts, places = args.prompt or [], (args.jsonl, args.out)
    how = (args.chat, args.batch, args.device, args.precision, args.compile)
    generate(args.run, args.plan, args.overrides, prompts, *places, *how)
    return 0


def _eval(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dlm eval",
        usage="dlm eval RUN [--tasks NAME …] [--prompts N] [key=value …] [options]",
        description="Measure a run's newest checkpoint: all that runs are compared by, and tasks (evaluation.json); "
        "or, if --tasks names some of lm-evaluation-harness, those (lm_eval.json).",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="for this time only, such as data.val_rows=64"
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="which to ask; default all that the run trains on",
    )
    parser.add_argument("--prompts", metavar="N", type=int, default=32, help="questions of each task; default 32")
    harness = parser.add_argument_group("tasks of lm-evaluation-harness (the extra eval)")
    harness.add_argument("--include", metavar="DIR", help="a folder with more of them")
    harness.add_argument(
        "--plan", metavar="PLAN", help="a decoder: a YAML, or a name of `dlm list`; default by pattern"
    )
    harness.add_argument(
        "--likelihood", metavar="HOW", default="bound", help="bound (default), or chain: exact and slow"
    )
    harness.add_argument("--samples", metavar="N", type=int, default=16, help="noise draws of a bound; default 16")
    harness.add_argument("--seed", metavar="N", type=int, default=0, help="of these draws; default 0")
    harness.add_argument("--limit", metavar="N", type=int, help="questions of each task; default all")
    harness.add_argument("--shots", metavar="N", type=int, help="examples before each question; default the task's own")
    harness.add_argument("--chat", action="store_true", help="ask in the tokenizer's chat template")
    harness.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the weights; default 32-true"
    )
    harness.add_argument("--batch", metavar="N", type=int, default=8, help="questions at a time; default 8")
    args = parser.parse_intermixed_args(argv)
    named = _names(word for word in args.tasks or () if "=" not in word)
    overrides = [*args.overrides, *(word for word in args.tasks or () if "=" in word)]
    runs.open_run(args.run)
    from dlm_lightning.tasks import NAMES

    ours, others = [name for name in named if name in NAMES], [name for name in named if name not in NAMES]
    if others and overrides and not ours:
        raise ValueError(f"{overrides[0]}: the tasks of lm-evaluation-harness take no overrides of a run")
    if others:
        _ask_harness(args, others)
    if ours or not others:
        from dlm_lightning.evaluation import evaluate

        path = evaluate(args.run, ours or None, args.prompts, overrides)
        if runs.is_first_process():
            print(path)
    return 0


def _names(words: Iterable[str]) -> list[str]:
    """What is named, one by one or behind commas."""
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def _ask_harness(args: argparse.Namespace, names: list[str]) -> None:
    if not util.find_spec("lm_eval"):
        raise ValueError(
            f"there is no task {names[0]} here, and those of lm-evaluation-harness need "
            "`pip install 'dlm_lightning[eval]'`"
        )
    for name, least in (("batch", 1), ("limit", 1), ("shots", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    from dlm_lightning.harness import Estimate, evaluate

    estimate = Estimate(args.likelihood, args.samples, args.seed)
    asked = {name: getattr(args, name) for name in ("plan", "include", "limit", "shots", "chat", "batch", "precision")}
    path = evaluate(args.run, names, estimate=estimate, **asked)
    if runs.is_first_process():
        print(path)


def _compare(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dlm compare",
        usage="dlm compare RECIPE… [key=value …] [--seeds N] [--run DIR] [options]",
        description="Train recipes and an AR control arm with the same work, measure them, write a report. The same "
        "command again goes on where it was cut off.",
    )
    parser.add_argument(
        "words", metavar="RECIPE | key=value", nargs="+", help="recipes by name or YAML; overrides for all"
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="runs of each recipe; default 1")
    parser.add_argument("--run", metavar="DIR", help="the comparison's folder; default runs/compare/<number>")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", metavar="N", type=int, help="optimizer steps of each; default the recipes' own")
    budget.add_argument("--forward-tokens", metavar="N", type=float, help="instead: equal tokens through the network")
    budget.add_argument("--seconds", metavar="S", type=float, help="instead: equal seconds of training")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time, which share out the cores")
    parser.add_argument("--no-control", action="store_true", help="leave out the AR control arm")
    parser.add_argument("--tasks", metavar="NAME", action="append", help="of `dlm eval`: NAME,…")
    parser.add_argument("--prompts", metavar="N", type=int, default=32, help="questions of each task; default 32")
    args = parser.parse_intermixed_args(argv)
    recipes = [word for word in args.words if "=" not in word]
    if not recipes:
        parser.error("which recipes? `dlm list` shows all")
    for recipe in recipes:
        catalog.find(recipe)
    from dlm_lightning.comparison import compare
    from dlm_lightning.comparison.request import Budget

    given = {unit: getattr(args, unit) for unit in ("steps", "forward_tokens", "seconds")}
    budget_given = [Budget(unit, amount) for unit, amount in given.items() if amount is not None]
    path = compare(
        recipes,
        [word for word in args.words if "=" in word],
        seeds=args.seeds,
        budget=budget_given[0] if budget_given else Budget(),
        folder=args.run,
        jobs=args.jobs,
        with_control=not args.no_control,
        tasks=_names(args.tasks or ()) or None,
        prompts=args.prompts,
    )
    print(f"report: {path}")
    return 0


def _bench(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dlm bench",
        usage="dlm bench RECIPE… [key=value …] [--baseline NAME …] [--growth KEY=V,V,…] [--out DIR] [options]",
        description="Time training steps of random weights on random tokens, in turns with an AR step of the same "
        "network and with baselines: a table, bench.json and bench.png.",
    )
    parser.add_argument(
        "words", metavar="RECIPE | key=value", nargs="+", help="recipes by name or YAML; overrides for all"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", nargs="+", action="extend", help="peers, fair: other ways to make the same step"
    )
    parser.add_argument("--turns", metavar="N", type=int, default=10, help="in which every arm steps once; default 10")
    parser.add_argument("--documents", metavar="N", type=int, default=1, help="packed into each row; default 1")
    parser.add_argument("--growth", metavar="KEY=V,V,…", help="repeat it for each value of a key, or of documents")
    parser.add_argument("--tflops", metavar="N", type=float, help="the device's peak; default its own, if it is known")
    parser.add_argument("--out", metavar="DIR", help="a new folder; default runs/bench/<number>")
    args = parser.parse_intermixed_args(argv)
    words = [*args.words, *(word for word in args.baseline or () if "=" in word)]
    recipes, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if not recipes:
        parser.error("which recipes? `dlm list` shows all")
    for recipe in recipes:
        catalog.find(recipe)
    from dlm_lightning.bench import Request, bench, growth

    grows = growth(args.growth) if args.growth is not None else None
    baselines = _names(word for word in args.baseline or () if "=" not in word)
    print(bench(Request(recipes, overrides, baselines, args.turns, args.documents, grows, args.tflops), args.out))
    return 0


def _report(run: Path) -> int:
    """The run's path as the last line of stdout, once however many processes there are."""
    if runs.is_first_process():
        print(f"run: {run}")
    return 0


def _list() -> int:
    tables = {"recipes": [(recipe.name, _title(recipe.path), recipe.origin) for recipe in catalog.recipes()]}
    for title, (package, bases) in catalog.PLUGINS.items():
        found = [(*path.rsplit(".", 1), about) for path, about in catalog.classes(package, bases)]
        tables[title] = [(name, about, module) for module, name, about in found]
    tables["decoders"] = [(name, _title(path), "dlm_lightning") for name, path in catalog.plans().items()]
    width = max(len(name) for rows in tables.values() for name, *_ in rows)
    columns = max(40, shutil.get_terminal_size().columns - width - 4)
    for title, rows in tables.items():
        print(title)
        for name, about, origin in rows:
            lines = [*wrap(about, columns, break_on_hyphens=False), f"from {origin}"]
            for start, line in zip_longest([name], lines, fillvalue=""):
                print(f"  {start:<{width}}  {line}")
    return 0


def _title(path: Path) -> str:
    """The first sentence of the comment that a YAML begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines).strip()
    return comment.split(". ")[0].rstrip(".") + "." if comment else "no description"


if __name__ == "__main__":
    sys.exit(main())
