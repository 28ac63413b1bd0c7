"""Commands that look at recipes and sources before anything is trained."""

from __future__ import annotations

import shutil
from itertools import takewhile, zip_longest
from pathlib import Path
from textwrap import wrap

from dlm_lightning import catalog
from dlm_lightning.commands.arguments import add_overrides, add_recipe, parser_of


def list_all(argv: list[str]) -> None:
    """List recipes, data modules, callbacks and decoders, and where each comes from."""
    parser_of("list", list_all).parse_args(argv)
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


def _title(path: Path) -> str:
    """The first sentence of the comment that a YAML begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines).strip()
    return comment.split(". ")[0].rstrip(".") + "." if comment else "no description"


def probe(argv: list[str]) -> None:
    """Find out whether a source converts, and what it is, before anything is trained."""
    parser = parser_of("probe", probe)
    parser.add_argument("source", metavar="SOURCE", help="a hub id, a local folder, or a run folder")
    add_overrides(parser, "as of a recipe, such as data.paths='[my/texts]'")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.probe import probe as find_out

    find_out(args.source, args.overrides)


def show(argv: list[str]) -> None:
    """Draw a recipe's attention pattern: who sees whom."""
    parser = parser_of("show", show)
    add_recipe(parser)
    parser.add_argument("--out", metavar="PNG", help="where the picture goes; default <recipe>.png")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.picture import show as draw

    print(draw(args.recipe, args.overrides, args.out))


def plan(argv: list[str]) -> None:
    """Say what a recipe will take: parameters, memory, tokens, FLOPs."""
    parser = parser_of("plan", plan)
    add_recipe(parser)
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.plan import show as say

    say(args.recipe, args.overrides)
