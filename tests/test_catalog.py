"""Recipes by name or path, fragments merged into one YAML, plug-in classes found without importing them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import yaml

from dlm_lightning import catalog


@pytest.fixture
def write(tmp_path):
    """`write("a/b.yaml", {…})`: a YAML file below tmp_path."""

    def to(name: str, content: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else yaml.safe_dump(content, sort_keys=False)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to


def test_a_recipe_merges_deeply_over_its_fragments_in_order_and_replaces_lists(write):
    write("first.yaml", {"model": {"a": 1, "b": 1, "c": 1, "d": 1}, "list": [1, 2, 3], "only": "first"})
    write("second.yaml", {"model": {"b": 2, "c": 2}, "list": [4, 5]})
    path = write("recipe.yaml", {"extends": ["first.yaml", "second.yaml"], "model": {"c": 3, "d": None}})
    assert catalog.compose(path) == {"model": {"a": 1, "b": 2, "c": 3, "d": None}, "list": [4, 5], "only": "first"}


def test_the_order_of_fragments_decides(write):
    write("first.yaml", {"x": 1})
    write("second.yaml", {"x": 2})
    assert catalog.compose(write("a.yaml", {"extends": ["first.yaml", "second.yaml"]})) == {"x": 2}
    assert catalog.compose(write("b.yaml", {"extends": ["second.yaml", "first.yaml"]})) == {"x": 1}


def test_fragments_are_relative_to_the_file_that_names_them_and_may_extend_others(write, tmp_path, monkeypatch):
    write("configs/deep/base.yaml", {"from": "base", "base": True})
    write("configs/middle.yaml", {"extends": "deep/base.yaml", "from": "middle", "middle": True})
    path = write("recipes/recipe.yaml", {"extends": ["../configs/middle.yaml"], "recipe": True})
    monkeypatch.chdir(tmp_path / "configs" / "deep")
    assert catalog.compose(path) == {"from": "middle", "base": True, "middle": True, "recipe": True}


def test_one_fragment_may_be_reached_twice(write):
    write("base.yaml", {"x": 0})
    write("left.yaml", {"extends": ["base.yaml"], "x": 1})
    write("right.yaml", {"extends": ["base.yaml"], "y": 1})
    assert catalog.compose(write("recipe.yaml", {"extends": ["left.yaml", "right.yaml"]})) == {"x": 0, "y": 1}


def test_interpolations_are_kept(write):
    write("base.yaml", {"dir": "${trainer.default_root_dir}"})
    path = write("recipe.yaml", {"extends": ["base.yaml"], "trainer": {"default_root_dir": "x"}})
    assert catalog.compose(path)["dir"] == "${trainer.default_root_dir}"


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("a: [", ValueError, "is not readable as YAML"),
        ("- a\n- b\n", ValueError, "is not a mapping"),
        ("3", ValueError, "is not readable as YAML"),
        ("extends: [gone.yaml]", FileNotFoundError, "gone.yaml, which does not exist"),
        ("extends: recipe.yaml", ValueError, "extends itself"),
        ("extends: [around.yaml]", ValueError, "extends itself"),
        ("extends: 3", ValueError, "names a file or a list of files"),
        ("extends: [[a]]", ValueError, "names a file or a list of files"),
        ("extends: ${gone}", ValueError, "is not readable as YAML"),
        (b"\xff\xfe\x00binary", ValueError, "is not readable as YAML"),
    ],
)
def test_a_yaml_that_cannot_be_composed_is_named(content, error, says, write):
    write("around.yaml", "extends: [recipe.yaml]")
    path = write("recipe.yaml", content)
    with pytest.raises(error, match=says) as caught:
        catalog.compose(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "# nothing\n", "extends:\n", "extends: []\n"])
def test_an_empty_yaml_is_an_empty_recipe(content, write):
    assert catalog.compose(write("recipe.yaml", content)) == {}


def test_find_takes_shipped_names_and_paths(write):
    shipped = catalog.find("block_causal")
    assert (shipped.path.name, shipped.origin) == ("block_causal.yaml", "dlm_lightning")
    path = write("mine.yaml", {})
    assert catalog.find(str(path)) == catalog.RecipeFile("mine", path, str(path.parent))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blok_causal", "there is no recipe blok_causal; did you mean block_causal? `dlm list` shows all"),
        ("qqqq", "there is no recipe qqqq; `dlm list` shows all"),
        ("gone.yaml", "there is no recipe file gone.yaml"),
    ],
)
def test_find_names_what_is_missing_and_what_is_near(name, says):
    with pytest.raises(FileNotFoundError) as caught:
        catalog.find(name)
    assert str(caught.value) == says


def test_recipes_are_the_yaml_files_of_the_repository():
    folder = Path(__file__).parents[1] / "recipes"
    shipped = [recipe.name for recipe in catalog.recipes() if recipe.origin == "dlm_lightning"]
    assert shipped == sorted(path.stem for path in folder.glob("*.yaml"))


def test_nearest():
    assert catalog.nearest("maks", ["mask", "task", "noise"]) == "; did you mean mask?"
    assert catalog.nearest("maks", {"unrelated": 1}) == ""


@pytest.mark.parametrize(("package", "base"), catalog.PLUGINS.values())
def test_classes_are_all_that_importing_would_find(package, base):
    """Found in the syntax tree; the reference imports every module and asks the classes themselves."""
    found = dict(catalog.classes(package, base))
    expected = {}
    for path in sorted(Path(importlib.import_module(package).__path__[0]).glob("*.py")):
        module = importlib.import_module(f"{package}.{path.stem}" if path.stem != "__init__" else package)
        for cls in vars(module).values():
            names = {parent.__name__ for parent in getattr(cls, "__mro__", ())[1:]}
            if base in names and cls.__module__ == module.__name__:
                expected[f"{module.__name__}.{cls.__name__}"] = cls.__doc__.split("\n")[0]
    assert found == expected
    assert found


def test_a_plug_in_that_fails_to_import_is_named_in_a_warning(tmp_path, monkeypatch):
    (tmp_path / "broken_plug_in.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = catalog.RecipeFile("broken", tmp_path / "x.yaml", "somewhere", "broken_plug_in")
    with pytest.warns(UserWarning, match=r"plug-in broken \(broken_plug_in\) fails to import: no licence"):
        catalog.make_importable(recipe)


@pytest.mark.parametrize(
    ("name", "init", "says"),
    [
        ("broken", "raise RuntimeError('no licence')", "fails to import: no licence"),
        ("block_causal", "", "has the name of a recipe of dlm_lightning"),
    ],
)
def test_a_plug_in_package_that_does_not_fit_is_left_out_with_a_warning(name, init, says, tmp_path, monkeypatch):
    package, info = tmp_path / "some_plugin", tmp_path / "some_plugin-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(init)
    for suffix in ("py", "yaml"):
        (package / f"more.{suffix}").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dlm_lightning.recipes]\n{name} = some_plugin.more\n")
    before = catalog.recipes()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=rf"plug-in {name} \(some_plugin.more\) {says} and is left out"):
        assert catalog.recipes() == before
    sys.modules.pop("some_plugin", None)
