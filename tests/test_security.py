"""What docs/security.md claims: nothing that is loaded runs code; a run writes into its folder, and no secret."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import yaml

from dlm_lightning import catalog, runs
from dlm_lightning.source import locate

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("dlm_lightning", "callbacks", "recipes") for path in (ROOT / folder).rglob("*.py")]
CALLS = [
    (path.relative_to(ROOT).as_posix(), ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords})
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
]
SECRET = "s3cr3t-0f-the-env1ronment"


def test_every_load_is_a_safe_one():
    loads = [(path, name, keys) for path, name, keys in CALLS if name == "torch.load"]
    assert loads and all(keys.get("weights_only") == "True" for _, _, keys in loads)
    assert {name for _, name, _ in CALLS if name.startswith("yaml.") and "load" in name} == {"yaml.safe_load"}
    unsafe = {"pickle.load", "pickle.loads", "pickle.Unpickler", "numpy.load", "np.load", "joblib.load", "eval", "exec"}
    assert not [(path, name) for path, name, _ in CALLS if name in unsafe]


def test_code_of_a_model_is_declined_at_every_load_but_those_that_ask_whether_the_source_is_trusted():
    loads = [
        (path, keys)
        for path, name, keys in CALLS
        if name.startswith("Auto") and name.split(".")[1] in ("from_pretrained", "from_config")
    ]
    asks = {"trusted": "dlm_lightning/", "self.trusted": "dlm_lightning/source.py"}
    assert len(loads) >= 4
    for path, keys in loads:
        trust = keys.get("trust_remote_code")
        assert trust == "False" or path.startswith(asks[trust]), (path, keys)


def test_pickled_weights_are_refused_by_name(source_folder, tmp_path):
    shutil.copy(source_folder() / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin only, a pickle"):
        locate(str(tmp_path))


@pytest.fixture
def with_code(source_folder, tmp_path):
    """`with_code(known)`: a source with a config and a model class of its own, which leave `it ran` when imported."""

    def make(known: bool) -> Path:
        folder, marker = tmp_path / "source", tmp_path / "it ran"
        shutil.copytree(source_folder(), folder)
        code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nfrom transformers import Qwen3Config\n"
        code += "class C(Qwen3Config):\n    model_type = 'x'\n"
        (folder / "config_x.py").write_text(code)
        code = "from transformers import Qwen3ForCausalLM\nfrom .config_x import C\n"
        (folder / "model_x.py").write_text(code + "class M(Qwen3ForCausalLM):\n    config_class = C\n")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "config_x.C", "AutoModelForCausalLM": "model_x.M"}
        (folder / "config.json").write_text(json.dumps(config | ({} if known else {"model_type": "x"})))
        return folder

    return make


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("command", ["fit", "plan", "probe", "show"])
def test_code_of_a_model_is_not_run(command, known, with_code, corpus, typed, tmp_path):
    folder = with_code(known)
    options = [f"model.source={folder}", "trainer.max_steps=1", "data.row_length=32", f"data.paths=[{corpus}]"]
    words = [folder] if command == "probe" else ["block_causal", *options, "trainer.limit_val_batches=0"]
    said = typed(command, *words, cwd=tmp_path)
    assert not (tmp_path / "it ran").exists()
    if known or command == "show":  # which draws a pattern and opens no model
        assert said.code == 0, said
    else:
        assert said.code == 1 and "is not run unless model.trust_remote_code is true" in said.err


def test_code_of_a_source_that_is_trusted_is_run_and_of_no_other(with_code, small, typed, tmp_path, monkeypatch):
    """The finished model brings the code along, and is a source that must be trusted by its own recipe."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = with_code(known=False), tmp_path / "it ran"
    callbacks = [
        f"{{class_path: dlm_lightning.callbacks.{name}}}"
        for name in ("checkpoints.Checkpoints", "save_pretrained.SavePretrained")
    ]
    words = small(model__source=folder, trainer__callbacks=f"[{', '.join(callbacks)}]")
    said = typed("fit", "block_causal", *words, "model.trust_remote_code=true", "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    assert marker.exists()
    assert typed("plan", "block_causal", *words, "model.trust_remote_code=true", cwd=tmp_path).code == 0
    assert typed("probe", folder, "model.trust_remote_code=true", cwd=tmp_path).code == 0
    marker.unlink()
    said = typed("fit", "block_causal", *small(model__source="run"), "--run", "next", cwd=tmp_path)
    assert said.code == 1 and "is not run unless model.trust_remote_code is true" in said.err
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/x", ""])
def test_a_recipe_name_cannot_leave_the_folder_of_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot name a folder below runs/"):
        runs.create(name, None)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refusal(typed, corpus, tmp_path):
    """What `dlm fit` of a recipe with something added answers; it leaves no file with the secret."""

    def run(**sections) -> str:
        own = {"extends": str(catalog.find("block_causal").path), **sections}
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(yaml.safe_dump(own))
        said = typed("fit", recipe, "--run", "run", cwd=tmp_path, env={"SECRET": SECRET})
        assert said.code == 1 and said.err.count("\n") == 1, said
        assert SECRET not in said.out + said.err
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert files and not any(SECRET.encode() in path.read_bytes() for path in files)
        assert not (tmp_path / "outside").exists()
        return said.err

    return run


def test_a_loggers_own_default_is_not_the_recipes(typed, small, tmp_path, monkeypatch):
    """As W&B's: `.` is where it keeps its own files, and one override is enough to have it."""
    (tmp_path / "elsewhere.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\nclass Elsewhere(CSVLogger):\n"
        "    def __init__(self, save_dir: str = '.'): super().__init__(save_dir)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [*small(trainer__callbacks="[]", trainer__limit_val_batches=0), "trainer.logger+=elsewhere.Elsewhere"]
    said = typed("fit", "block_causal", *words, "--run", "run", cwd=tmp_path)
    assert said.code == 0, said.err
    asked = [*words, "trainer.logger.save_dir=outside"]
    said = typed("fit", "block_causal", *asked, "--run", "other", cwd=tmp_path)
    assert said.code == 1 and "lies outside of the run folder" in said.err


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "x-${oc.env:SECRET,none}"])
def test_a_value_from_the_environment_is_refused(value, refusal):
    said = refusal(data={"init_args": {"paths": [value]}})
    assert said.startswith("dlm: data.paths[0]: a value from the environment (oc.env) would be written to config.yaml")


def test_a_password_in_a_url_is_refused(refusal):
    said = refusal(data={"init_args": {"paths": ["https://me:word@example.org/x.txt"]}})
    assert "a URL with a password" in said and "word@" not in said


@pytest.mark.parametrize(
    "trainer",
    [
        {"logger": {"class_path": "dlm_lightning.loggers.MetricsCSV", "init_args": {"save_dir": "outside"}}},
        {
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "${trainer.default_root_dir}", "name": "../../outside"},
            }
        },
        {
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "outside"}}
            ]
        },
    ],
)
def test_what_a_run_writes_lies_in_its_folder(trainer, refusal):
    assert "lies outside of the run folder" in refusal(trainer=trainer)
