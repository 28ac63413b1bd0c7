"""Documents say what is there: the tree names every file, links lead somewhere, recipes and keys in commands exist."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning import Trainer

from dlm_lightning import catalog
from dlm_lightning.errors import parameters
from dlm_lightning.generate import read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [
    path.relative_to(ROOT)
    for folder in ("dlm_lightning", "recipes", "callbacks", "configs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".sbatch") and path.name != "__init__.py"
    if not any((ROOT / parent).is_symlink() for parent in path.relative_to(ROOT).parents)
]
ELSEWHERE = ("RECIPE", "path", "mine", "mine.yaml", "runs")  # where a command's recipe begins that the repository lacks


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_tree_names_every_file(path):
    tree = README.split("## The tree")[1]
    assert path.name in tree or f"{path.stem}.yaml .py" in tree


def test_the_tree_names_no_file_that_is_not_there():
    tree = README.split("## The tree")[1].split("##")[0]
    names = {path.name for path in FILES} | {path.name for path in (ROOT / "docs").rglob("*")}
    for name in re.findall(r"[\w/]+\.(?:py|yaml|md|sbatch)\b", tree):
        assert Path(name).name in names | {path.name for path in (ROOT / "tests").rglob("*.py")}, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_recipes_and_keys_in_commands_exist(path):
    for name, words in re.findall(r"(?:dlm|dlm_lightning\.cli) fit ([\w./]+)((?: [^\n`]*)?)", path.read_text()):
        if name.split("/")[0] in ELSEWHERE:
            continue
        config = catalog.compose(catalog.find(str(ROOT / name) if "/" in name else name).path)
        known = {"trainer": set(inspect.signature(Trainer).parameters)}
        for section in ("model", "data"):
            known[section] = set(parameters(config[section]["class_path"]))
        for section, key in re.findall(r"\b(model|data|trainer)\.(\w+)=", words):
            assert key in known[section], f"{section}.{key}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_plans_and_their_keys_in_commands_exist(path):
    for line in re.findall(r"dlm generate ([^\n`]*)", path.read_text()):
        for name in re.findall(r"--plan (\w+)(?!\.yaml)\b", line):
            assert name in ("NAME", "mine", *catalog.plans())
        words = re.findall(r"\b((?:selector|cache|stopper|sampling)\.\w+=\S+)", line)
        plan = next((name for name in re.findall(r"--plan (\w+)", line) if name in catalog.plans()), "block")
        read(plan, words)


def test_the_table_of_decoders_is_whole():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (?:yes|no) \|", (ROOT / "docs" / "decoding.md").read_text(), re.M)
    assert set(rows) == set(catalog.plans())


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documents as `make docs` builds them: a warning, such as a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = ["sphinx-build", "--quiet", "--fail-on-warning", "docs", str(folder)]
    done = subprocess.run(
        [Path(sys.executable).parent / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_every_page_is_on_the_site(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 20 and all((site / page).is_file() for page in pages)
    index = (site / "index.html").read_text()
    assert all(f'href="{page}"' in index for page in map(str, pages - {Path("index.html")})), "each is in the contents"


@pytest.mark.parametrize(
    ("package", "bases"),
    [
        ("dlm_lightning.recipes", ("Recipe",)),
        ("dlm_lightning.decode", ("Selector", "Reuse", "Prefix")),
        *catalog.PLUGINS.values(),
    ],
)
def test_the_reference_has_every_class_that_a_yaml_may_name(site, package, bases):
    text = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    found = [path for path, _ in catalog.classes(package, bases)]
    assert len(found) > 3
    for path in found:
        assert f'id="{path}"' in text, path
