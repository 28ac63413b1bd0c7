"""Commands that make a run, go on with it, or say what it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from dlm_lightning import catalog, runs
from dlm_lightning.commands.arguments import add_overrides, add_run, parser_of

FIT_HELP = """
  dlm fit block_causal                                    a shipped recipe by name …
  dlm fit mine.yaml model.block_size=32 --run runs/mine   … or a YAML, with overrides and a folder of one's own

key=value stands for LightningCLI's --key=value; all of its options work:
  --print_config            the resolved configuration, then stop
  --help, --model.help CLASS, --data.help CLASS   what can be set
  --ckpt_path DIR           start a new run from a checkpoint, such as runs/block_causal/1/checkpoints/step=100
"""


def fit(argv: list[str]) -> None:
    """Train a recipe in a new run folder."""
    usage = "RECIPE [key=value …] [--run DIR] [--ckpt_path DIR] [LightningCLI options]"
    layout = argparse.RawDescriptionHelpFormatter
    options = {"epilog": FIT_HELP, "formatter_class": layout, "add_help": False, "allow_abbrev": False}
    parser = parser_of("fit", fit, usage, **options)
    parser.add_argument("--run", metavar="DIR", help="the run folder; default runs/<recipe>/<number>")
    parser.add_argument("--ckpt_path", metavar="DIR", help="a checkpoint of the same recipe to start from")
    args, words = parser.parse_known_args(argv)
    recipe = next((word for word in words if not word.startswith("-") and "=" not in word), None)
    if recipe is None and {"--help", "-h"} & set(words):
        parser.print_help()
        return
    if recipe is None:
        parser.error("which recipe? `dlm list` shows all")
    words.remove(recipe)
    catalog.find(recipe)  # a wrong name is answered before seconds of imports
    from dlm_lightning import training

    _name(training.fit(recipe, words, args.run, args.ckpt_path))


def resume(argv: list[str]) -> None:
    """Continue a run from its newest complete checkpoint."""
    parser = parser_of("resume", resume)
    add_run(parser)
    add_overrides(parser, "for this time only, such as trainer.devices=2")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning import training

    _name(training.resume(args.run, args.overrides))


def validate(argv: list[str]) -> None:
    """Validate a run's newest checkpoint."""
    parser = parser_of("validate", validate)
    add_run(parser)
    args = parser.parse_args(argv)
    from dlm_lightning import training

    _name(training.validate(args.run))


def replay(argv: list[str]) -> None:
    """Make one step of a run again and say what it gave."""
    parser = parser_of("replay", replay)
    parser.add_argument("run", metavar="RUN", help="a run folder, which stays as it is")
    parser.add_argument("--step", metavar="N", type=int, required=True, help="which step, counted from 1")
    add_overrides(parser, "such as trainer.devices=1 trainer.strategy=auto")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.replay import show

    show(args.run, args.step, args.overrides)


def summary(argv: list[str]) -> None:
    """Show a conversion's tables: NELBO, drift, a continuation, files."""
    parser = parser_of("summary", summary)
    add_run(parser)
    args = parser.parse_args(argv)
    from dlm_lightning.summary import summarize

    summarize(args.run)


def _name(run: Path) -> None:
    """The run's path as the last line of stdout, once however many processes there are."""
    if runs.is_first_process():
        print(f"run: {run}")
