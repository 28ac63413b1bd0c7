"""Commands that measure runs, compare them, and time recipes."""

from __future__ import annotations

import argparse
from importlib import util

from dlm_lightning import runs
from dlm_lightning.commands.arguments import (
    PRECISIONS,
    add_overrides,
    add_recipes,
    add_run,
    parser_of,
    recipes,
    split,
)


def bench(argv: list[str]) -> None:
    """Time a recipe's step beside baselines and an AR step.

    Steps of random weights on random tokens, in turns: a table, bench.json and bench.png.
    """
    parser = parser_of(
        "bench", bench, "RECIPE… [key=value …] [--baseline NAME …] [--growth KEY=V,V,…] [--out DIR] [options]"
    )
    add_recipes(parser)
    parser.add_argument(
        "--baseline", metavar="NAME", nargs="+", action="extend", help="peers, fair: other ways to make the same step"
    )
    parser.add_argument("--turns", metavar="N", type=int, default=10, help="in which every arm steps once; default 10")
    parser.add_argument("--documents", metavar="N", type=int, default=1, help="packed into each row; default 1")
    parser.add_argument("--growth", metavar="KEY=V,V,…", help="repeat it for each value of a key, or of documents")
    parser.add_argument("--tflops", metavar="N", type=float, help="the device's peak; default its own, if it is known")
    parser.add_argument("--out", metavar="DIR", help="a new folder; default runs/bench/<number>")
    args = parser.parse_intermixed_args(argv)
    given = args.baseline or []
    names, overrides = recipes(parser, [*args.words, *(word for word in given if "=" in word)])
    from dlm_lightning.bench import Request, growth
    from dlm_lightning.bench import bench as time

    grows = growth(args.growth) if args.growth is not None else None
    baselines = split(word for word in given if "=" not in word)
    print(time(Request(names, overrides, baselines, args.turns, args.documents, grows, args.tflops), args.out))


def evaluate(argv: list[str]) -> None:
    """Measure all that runs are compared by, and tasks, on a run's newest checkpoint.

    It writes evaluation.json in the run or, if --tasks names some of lm-evaluation-harness, lm_eval.json.
    """
    parser = parser_of("eval", evaluate, "RUN [--tasks NAME …] [--prompts N] [key=value …] [options]")
    add_run(parser)
    add_overrides(parser, "for this time only, such as data.val_rows=64")
    parser.add_argument(
        "--tasks",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
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
    named = split(word for word in args.tasks if "=" not in word)
    overrides = [*args.overrides, *(word for word in args.tasks if "=" in word)]
    runs.open_run(args.run)
    from dlm_lightning.tasks import NAMES

    ours, others = [name for name in named if name in NAMES], [name for name in named if name not in NAMES]
    for option in harness._group_actions if not others else ():
        if getattr(args, option.dest) != option.default:
            parser.error(
                f"{option.option_strings[0]} is for tasks of lm-evaluation-harness, and --tasks names none of them"
            )
    if others and not ours and args.prompts != parser.get_default("prompts"):
        parser.error("--prompts is for tasks of this project, and --tasks names none of them; --limit is the harness's")
    if others and overrides and not ours:
        raise ValueError(f"{overrides[0]}: the tasks of lm-evaluation-harness take no overrides of a run")
    if others:
        _ask_harness(args, others)
    if ours or not others:
        from dlm_lightning.evaluation import evaluate as measure

        path = measure(args.run, ours or None, args.prompts, overrides)
        if runs.is_first_process():
            print(path)


def _ask_harness(args: argparse.Namespace, names: list[str]) -> None:
    if not util.find_spec("lm_eval"):
        raise ValueError(
            f"there is no task {names[0]} here, and those of lm-evaluation-harness need "
            "`pip install 'dlm_lightning[eval]'`"
        )
    for name, least in (("batch", 1), ("limit", 1), ("shots", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    from dlm_lightning.harness import evaluate
    from dlm_lightning.harness.model import Estimate

    estimate = Estimate(args.likelihood, args.samples, args.seed)
    asked = {name: getattr(args, name) for name in ("plan", "include", "limit", "shots", "chat", "batch", "precision")}
    path = evaluate(args.run, names, estimate=estimate, **asked)
    if runs.is_first_process():
        print(path)


def compare(argv: list[str]) -> None:
    """Train several recipes and an AR control arm with the same work, and compare.

    All are measured and put side by side in a report. The same command again goes on where it was cut off.
    """
    parser = parser_of("compare", compare, "RECIPE… [key=value …] [--seeds N] [--run DIR] [options]")
    add_recipes(parser)
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="runs of each recipe; default 1")
    parser.add_argument("--run", metavar="DIR", help="the comparison's folder; default runs/compare/<number>")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", metavar="N", type=int, help="optimizer steps of each; default the recipes' own")
    budget.add_argument("--forward-tokens", metavar="N", type=float, help="instead: equal tokens through the network")
    budget.add_argument("--seconds", metavar="S", type=float, help="instead: equal seconds of training")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time, which share out the cores")
    parser.add_argument("--no-control", action="store_true", help="leave out the AR control arm")
    parser.add_argument("--tasks", metavar="NAME", action="append", default=[], help="of `dlm eval`: NAME,…")
    parser.add_argument("--prompts", metavar="N", type=int, default=32, help="questions of each task; default 32")
    args = parser.parse_intermixed_args(argv)
    names, overrides = recipes(parser, args.words)
    from dlm_lightning.comparison import compare as train_all
    from dlm_lightning.comparison.request import Budget

    given = {unit: getattr(args, unit) for unit in ("steps", "forward_tokens", "seconds")}
    budget_given = [Budget(unit, amount) for unit, amount in given.items() if amount is not None]
    path = train_all(
        names,
        overrides,
        seeds=args.seeds,
        budget=budget_given[0] if budget_given else Budget(),
        folder=args.run,
        jobs=args.jobs,
        with_control=not args.no_control,
        tasks=split(args.tasks) or None,
        prompts=args.prompts,
    )
    print(f"report: {path}")


def report(argv: list[str]) -> None:
    """Put runs side by side: report.html and report.md."""
    parser = parser_of("report", report)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or a comparison's folder")
    parser.add_argument("--out", metavar="DIR", help="a folder; default that of a comparison, or this one")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.report import report as put

    print(put(args.runs, args.out))


def drift(argv: list[str]) -> None:
    """Measure how far the weights of one checkpoint are from those of another."""
    parser = parser_of("drift", drift)
    places = "a hub id, a Hugging Face folder, a run, or one of its checkpoints"
    parser.add_argument("before", metavar="A", help=places)
    parser.add_argument("after", metavar="B", help="what has moved; any of these, too")
    parser.add_argument("--out", metavar="DIR", help="a new folder for drift.parquet and drift.png")
    args = parser.parse_args(argv)
    from dlm_lightning.drift_between import drift as measure

    measure(args.before, args.after, args.out)
