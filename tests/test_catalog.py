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


KEPT = {"row_length": 4096, "batch_size": 1, "val_rows": 512, "seed": 0, "num_workers": 4}  # that all modules take


@pytest.mark.parametrize(
    ("shipped", "class_path", "own", "kept"),
    [
        ("recipes/efficient_dlm_qwen3_4b", "chat.Chat", {"hub": "some/set"}, KEPT | {"paths": ["data/text"]}),
        ("configs/data/own_text", "hub_text.HubText", {"path": "a", "seed": 3}, {"val_rows": 512, "num_workers": 4}),
        ("configs/data/own_text", "nowhere.Nothing", {}, {"paths": ["data/text"], "val_rows": 512, "seed": 0}),
    ],
)
def test_a_class_in_place_of_another_inherits_what_it_takes(shipped, class_path, own, kept, write):
    """What it does not know is left to the parser if there is no such class."""
    data = {"class_path": f"dlm_lightning.data.{class_path}", "init_args": own}
    root = Path(__file__).parents[1]
    path = write("recipe.yaml", {"extends": str(root / f"{shipped}.yaml"), "data": data})
    composed = catalog.compose(path)["data"]
    assert composed["class_path"] == data["class_path"]
    assert composed["init_args"].items() >= (kept | own).items()
    assert "nowhere" in class_path or set(composed["init_args"]) == set(kept | own)


def test_the_parser_takes_what_a_class_inherits(typed, write, tmp_path):
    """A recipe that gives its base some keys itself, conversations and a hub set, in YAMLs with only their own keys."""
    mine = "class Mine(ArSource):\n    def __init__(self, **options): super().__init__(**options)\n"
    write("mine.py", f"from dlm_lightning.recipes.ar_source import ArSource\n{mine}")
    root = Path(__file__).parents[1]
    model = {"class_path": "mine.Mine", "init_args": {"weight_decay": 0.5}}
    data = {"class_path": "dlm_lightning.data.hub_text.HubText", "init_args": {"path": "user/set"}}
    write(
        "mine.yaml", {"extends": str(root / "recipes/block_causal_qwen3_0_6b_24gb.yaml"), "model": model, "data": data}
    )
    chat = {"class_path": "dlm_lightning.data.chat.Chat", "init_args": {"paths": ["my/chats"]}}
    write("chat.yaml", {"extends": str(root / "recipes/efficient_dlm_qwen3_4b.yaml"), "data": chat})
    for name, section, expected in [
        ("mine", "model", {"source": "Qwen/Qwen3-0.6B-Base", "weight_decay": 0.5, "warmup_steps": 200}),
        ("mine", "data", {"path": "user/set", "row_length": 1024, "val_rows": 512}),
        ("chat", "data", {"paths": ["my/chats"], "row_length": 4096, "batch_size": 1}),
    ]:
        said = typed("fit", f"{name}.yaml", "--print_config", cwd=tmp_path)
        assert said.code == 0, said.err
        given = yaml.safe_load(said.out)[section]["init_args"]
        assert {key: given[key] for key in expected} == expected


def test_a_class_in_place_of_another_is_pruned_wherever_it_stands_but_in_lists(write, tmp_path, monkeypatch):
    (tmp_path / "pruned_classes.py").write_text(
        "class One:\n    def __init__(self, a, b=2): pass\n"
        "class Two(One):\n    def __init__(self, c=3, **options): super().__init__(**options)\n"
        "class Three(One):\n    def __init__(self, c=3): super().__init__(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def node(name, **init_args):
        return {"class_path": f"pruned_classes.{name}", "init_args": init_args}

    write("base.yaml", {"model": node("One", a=1, inner=node("One", a=1)), "logger": node("Two", a=1, c=4)})
    write("list.yaml", {"extends": "base.yaml", "trainer": {"callbacks": [node("One", a=1)]}})
    own = {"model": {"init_args": {"inner": node("Three")}}, "logger": node("Three", d=5)}
    own |= {"trainer": {"callbacks": [node("Two")]}}
    composed = catalog.compose(write("recipe.yaml", {"extends": "list.yaml", **own}))
    assert composed["model"] == node("One", a=1, inner=node("Three"))
    assert composed["logger"] == node("Three", c=4, d=5)
    assert composed["trainer"] == {"callbacks": [node("Two")]}
    same = {"extends": "base.yaml", "logger": {"class_path": "pruned_classes.Two"}}
    assert catalog.compose(write("same.yaml", same))["logger"] == node("Two", a=1, c=4)
    base = {"extends": "base.yaml", "model": {"class_path": "pruned_classes.Two"}}
    assert catalog.compose(write("two.yaml", base))["model"]["init_args"] == {"a": 1}


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


@pytest.mark.parametrize(("package", "bases"), catalog.PLUGINS.values())
def test_classes_are_all_that_importing_would_find(package, bases):
    """Found in the syntax tree; the reference imports every module and asks the classes themselves."""
    found = dict(catalog.classes(package, bases))
    expected = {}
    for path in sorted(Path(importlib.import_module(package).__path__[0]).glob("*.py")):
        module = importlib.import_module(f"{package}.{path.stem}" if path.stem != "__init__" else package)
        for cls in vars(module).values():
            names = {parent.__name__ for parent in getattr(cls, "__mro__", ())[1:]}
            if names & set(bases) and cls.__module__ == module.__name__ and cls.__name__ not in bases:
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
