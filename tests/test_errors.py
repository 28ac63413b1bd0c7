"""Bad input: one sentence that names the key and the nearest valid name, and nothing begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dlm_lightning.errors import sentence

SHIPPED = Path(__file__).parents[1] / "recipes" / "block_causal.yaml"
CHECKPOINTS = "dlm_lightning.callbacks.checkpoints.Checkpoints"


def nested(key: str, value: object) -> dict:
    """`a.b: value` as YAML nests it."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


UNKNOWN_KEYS = {
    "model.init_args.blok_size": "model.blok_size: BlockCausal takes no such key; did you mean block_size?",
    "model.init_args.warmup_step": "model.warmup_step: BlockCausal takes no such key; did you mean warmup_steps?",
    "model.init_args.noise.masing": "model.noise.masing: there is no such key; did you mean masking?",
    "model.init_args.noise.halflife": "model.noise.halflife: there is no such key; did you mean half_life?",
    "data.init_args.row_lenght": "data.row_lenght: TextFiles takes no such key; did you mean row_length?",
    "data.init_args.sufixes": "data.sufixes: TextFiles takes no such key; did you mean suffixes?",
    "trainer.max_step": "there is no key trainer.max_step; did you mean trainer.max_steps?",
    "seed_everythin": "there is no key seed_everythin; did you mean seed_everything?",
    "moddel": "there is no key moddel; did you mean model?",
    "modle.block_size": "there is no key modle.block_size; did you mean model.block_size?",
    "trainer.zzzz": "there is no key trainer.zzzz",
    "model.init_args.zzzz": "model.zzzz: BlockCausal takes no such key",
    "zzzz": "there is no key zzzz",
}


@pytest.mark.parametrize("key", UNKNOWN_KEYS)
def test_an_unknown_key_in_an_override(key, refused, small, tmp_path):
    for word in (f"{key}=3", f"{key.replace('.init_args', '')}=3", f"--{key}=3"):
        assert refused("fit", "block_causal", *small(), word, cwd=tmp_path) == UNKNOWN_KEYS[key]


@pytest.mark.parametrize("key", UNKNOWN_KEYS)
def test_an_unknown_key_in_yaml(key, refused, small, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extends": str(SHIPPED), **nested(key, 3)}))
    said = refused("fit", "mine.yaml", *small(), cwd=tmp_path)
    assert said == UNKNOWN_KEYS[key]


CLASSES = {
    "model.class_path=dlm_lightning.recipes.block_causal.BlokCausal": "there is no BlokCausal in "
    "dlm_lightning.recipes.block_causal; did you mean BlockCausal?",
    "model.class_path=dlm_lightning.recipes.blok_causal.BlockCausal": "there is no blok_causal in "
    "dlm_lightning.recipes; did you mean block_causal?",
    "model.class_path=BlokCausal": "BlokCausal is not a full class path; did you mean "
    "dlm_lightning.recipes.block_causal.BlockCausal?",
    "model.class_path=nowhere.Nothing": "No module named 'nowhere'",
    "model.class_path=torch.nn.Linear": "not correspond to a subclass of Recipe",
    "data.class_path=dlm_lightning.data.text_files.TextFile": "there is no TextFile in "
    "dlm_lightning.data.text_files; did you mean TextFiles?",
    "data.class_path=TextFile": "did you mean dlm_lightning.data.text_files.TextFiles?",
    "data.class_path=ExactAnswer": "did you mean dlm_lightning.data.exact_answers.ExactAnswers?",
    f"trainer.callbacks=[{{class_path: {CHECKPOINTS[:-1]}}}]": "there is no Checkpoint in "
    "dlm_lightning.callbacks.checkpoints; did you mean Checkpoints?",
    "trainer.callbacks=[{class_path: Sample}]": "did you mean dlm_lightning.callbacks.samples.Samples?",
    f"trainer.callbacks=[{{class_path: {CHECKPOINTS}, init_args: {{every_n_step: 2}}}}]":
    "trainer.callbacks.every_n_step: Checkpoints takes no such key; did you mean every_n_steps?",
}  # fmt: skip


@pytest.mark.parametrize("word", CLASSES)
def test_an_unknown_class(word, refused, small, tmp_path):
    said = refused("fit", "block_causal", *small(), word, cwd=tmp_path)
    assert said.startswith(word.partition("=")[0].removesuffix(".class_path"))
    assert CLASSES[word] in said


VALUES = {
    "model.block_size=many": "model.block_size: expected int, got many",
    "model.block_size.x=1": "model.block_size: expected int, got a key x",
    "model.lr=.nan": "model.lr must be above 0, not nan",
    "model.betas=[2,3]": "model.betas must lie in [0, 1), not (2.0, 3.0)",
    "model.weight_decay=-1": "model.weight_decay must be at least 0, not -1.0",
    "model.min_lr_ratio=-1": "model.min_lr_ratio must be at least 0, not -1.0",
    "model.block_size=0": "block_size must be at least 1 or null, not 0",
    "model.lr=fast": "model.lr: expected float, got fast",
    "model.betas=[1,2,3]": "model.betas: expected tuple with 2 elements, got [1, 2, 3]",
    "model.shift=sideways": "model.shift: expected Literal['none', 'next_token'], got sideways",
    "model.noise=3": "model.noise: expected keys and values, got '3'",
    "model.noise=null": "model.noise must not be null; leave it out for its default",
    "data.vocab_size= ": "data.vocab_size: expected int, got nothing",
    "data.suffixes=[]": "data.suffixes must be suffixes with their dot, such as .txt, not []",
    "data.suffixes=[txt]": "data.suffixes must be suffixes with their dot, such as .txt, not ['txt']",
    "model.block_schedule.steps=8": "model.block_schedule: it lacks sizes",
    "model.lora.rank+=8": "model.lora.rank+: Lora takes no such key; did you mean rank?",
    "model.first_token=?": "model: a key is a NoneType, and keys are names",
    "model.noise.masking=half": "model.noise.masking: expected Literal['bernoulli', 'exact', 'exact_round', 'tilted', "
    "'complementary'], got half",
    "model.noise.half_life=long": "model.noise.half_life: expected float, got long",
    "data.batch_size=2.5": "data.batch_size: expected int, got 2.5",
    "data.val_share=1.5": "data.val_share must lie between 0 and 1, not 1.5",
    "data.row_length=1": "data.row_length must be at least 2, not 1",
    "trainer=3": "trainer: expected keys and values, got '3'",
    "trainer.max_steps=soon": "trainer.max_steps: expected int, got soon",
    "trainer.default_root_dir=elsewhere": "trainer.default_root_dir is the run folder; name it by --run DIR",
    "trainer.strategy=ddp_spawn": "trainer.strategy: processes that are spawned bring nothing back; take ddp or fsdp2",
    "trainer.use_distributed_sampler=true": "trainer.use_distributed_sampler must be false",
    "trainer.default_root_dir=null": "trainer.default_root_dir is the run folder; name it by --run DIR",
    "trainer.val_check_interval={days: 1}": "trainer.val_check_interval must be a number, of micro-batches",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch must be at least 1 or null",
    "trainer.max_time={}": "trainer.max_time must be null",
    "trainer.barebones=true": "`Trainer(barebones=True, logger=[MetricsCSV, TensorBoardLogger])` was passed",
    "trainer.logger={class_path: lightning.pytorch.loggers.MLFlowLogger}": "MLFlowLogger: Requirement 'mlflow",
    "trainer.callbacks={class_path: lightning.pytorch.callbacks.BackboneFinetuning}": "callback BackboneFinetuning: "
    "'BlockCausal' object has no attribute 'backbone'",
    "trainer.callbacks={class_path: lightning.pytorch.callbacks.BaseFinetuning}": "callback BaseFinetuning: ",
    "trainer.val_check_interval=0": "trainer.val_check_interval must not be 0; trainer.limit_val_batches=0",
    "data.vocab_size=300": "data.vocab_size must be null: the source brings its own tokenizer",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1",
    "trainer.limit_train_batches=0": "the run ended at step 0 of 6: the trainer's limit_train_batches",
    "trainer.accelerator=abacus": "You selected an invalid accelerator name: `accelerator='abacus'`.",
    "seed_everything=often": "seed_everything: expected bool or int",
    "model.config={model_type: qwen3}": "give one of model.source (a pretrained model) and model.config",
    # masking and weight
    "model.noise.masking=bernoulli": "noise.weight: inverse_t does not go with noise.masking: bernoulli, "
    "which takes inverse_p",
    "model.noise.weight=one": "noise.weight: one does not go with noise.masking: tilted, "
    "which takes inverse_t or count_ratio",
    "model.noise={masking: complementary, weight: one}": "noise.masking: complementary does not go with BlockCausal",
    "model.noise.half_life=0": "noise.half_life must be above 0, not 0.0",
    "model.ar_weight=1": "model.ar_weight above 0 needs model.context_rank: causal",
    "model.context=noisy model.context_rank=causal": "context_rank: causal needs context: clean",
    "model.views=0": "model.views must be at least 1, not 0",
    "model.context=noisy model.views=2": "model.views: 2 needs a clean copy that the views share, ",
    # the mask token
    "model.mask_token=999": "model.mask_token: id 999 is outside the vocabulary of 300 rows",
    "model.mask_token=-1": "model.mask_token: id -1 is outside the vocabulary of 300 rows",
    "model.mask_token=300": "model.mask_token: id 300 is outside the vocabulary of 300 rows",
    "model.mask_token=0": "model.mask_token: id 0 occurs 5 times in the data; choose another",  # ends of documents
    "model.mask_token=<mask>": "model.mask_token: the tokenizer has no token '<mask>'",
    # the corpus
    "data.paths=[nowhere]": "data.paths: nothing matches nowhere",
    "data.paths=['*.nothing']": "data.paths: nothing matches *.nothing",
    "data.paths=[*.nothing]": "data.paths: expected a list, written [one, two]",  # an alias, to YAML
    "data.paths=corpus": "data.paths: expected a list, written [one, two]",
    "data.paths=[]": "data.paths: ",
    "data.val_paths=[]": "data.val_paths must name what to validate on; null keeps a share of data.paths",
    "data.paths=[hollow]": "data.paths: hollow holds no file (.py .md ",
    "data.paths=[blank]": "data: the train split is empty; it needs more documents",
    "model.block_size=32": "data.row_length must be at least model.block_size, 32, not 24",
    # the source
    "model.source=nowhere": "model.source: there is no folder nowhere",
    "model.source=hollow": "model.source: hollow holds no model (no config.json in it)",
    "model.source=someone/something": "model.source: someone/something is no local folder and cannot be fetched",
}


@pytest.mark.parametrize("words", VALUES)
def test_a_wrong_value(words, refused, small, tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "blank").mkdir()
    for name in "abc":
        (tmp_path / "blank" / f"{name}.txt").touch()
    split = words.split(" ") if words.startswith("model.context=") else [words]
    said = refused("fit", "block_causal", *small(), *split, cwd=tmp_path)
    assert said.startswith(VALUES[words])


NOT_KEYS = {
    "model: {init_args: {lr: null}}": "model.lr must not be null; leave it out for its default",
    "model: {init_args: {noise: {t_per: null}}}": "model.noise.t_per must not be null",
    "model: {init_args: {lora: {rank: null}}}": "model.lora.rank must not be null",
    "trainer: {max_steps: null}": "trainer.max_steps must not be null",
    "trainer: null": "trainer: expected keys and values, got None",
    "model: {init_args: 3}": "model: init_args takes keys and values",
    "model: {init_args: {zzz: {1: 2}}}": "a key in the recipe is 1, and keys are names",
}


@pytest.mark.parametrize("content", NOT_KEYS)
def test_what_only_yaml_can_say(content, refused, small, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"extends: {SHIPPED}\n{content}\n")
    words = [word for word in small() if not word.startswith("trainer.max_steps")]
    assert refused("fit", "mine.yaml", *words, cwd=tmp_path).startswith(NOT_KEYS[content])


def test_a_callback_whose_default_is_an_enum_is_written_to_the_configuration(typed, small, tmp_path):
    words = small(trainer__callbacks="[{class_path: lightning.pytorch.callbacks.Timer}]", trainer__max_steps=1)
    said = typed("fit", "block_causal", *words, "--run", "a", cwd=tmp_path)
    assert said.code == 0, said.err
    assert (
        yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]["interval"]
        == "step"
    )


def test_a_recipe_whose_annotations_are_for_a_type_checker_alone_is_not_looked_into(typed, small, tmp_path):
    (tmp_path / "checked.py").write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from dlm_lightning.recipes.block_causal import BlockCausal\n"
        "if TYPE_CHECKING:\n    from fractions import Fraction\n"
        "class Checked(BlockCausal):\n"
        "    def __init__(self, extra: Fraction | None = None, **options):\n        super().__init__(**options)\n"
    )
    (tmp_path / "checked.yaml").write_text(f"extends: {SHIPPED}\nmodel: {{class_path: checked.Checked}}\n")
    said = typed("fit", "checked.yaml", *small(trainer__max_steps=1), "trainer.callbacks=[]", cwd=tmp_path)
    assert said.code == 0, said.err


def test_the_run_folder_is_not_moved_by_a_configuration_file(refused, small, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {default_root_dir: elsewhere}")
    said = refused("fit", "block_causal", *small(), "--config", "more.yaml", "--run", "a", cwd=tmp_path)
    assert said == "trainer.default_root_dir is the run folder; name it by --run DIR"


@pytest.mark.parametrize("option", ["run", "ckpt_path"])
def test_an_option_that_is_written_as_a_key(option, refused, small, tmp_path):
    said = refused("fit", "block_causal", *small(), f"{option}=a", cwd=tmp_path)
    assert said == f"{option} is an option of dlm fit: --{option} PATH"


def test_an_empty_argument(refused, small, tmp_path):
    assert refused("fit", "block_causal", *small(), "", cwd=tmp_path) == "an argument is empty; write key=value"


def test_a_run_folder_needs_a_name(refused, small, tmp_path):
    assert refused("fit", "block_causal", *small(), "--run", "", cwd=tmp_path) == "--run needs the name of a folder"


def test_a_run_that_ends_early_says_so_and_keeps_what_it_has(typed, small, tmp_path):
    said = typed("fit", "block_causal", *small(trainer__limit_train_batches=3), "--run", "a", cwd=tmp_path)
    assert said.code == 1
    assert said.err.startswith("dlm: the run ended at step 3 of 6: the trainer's limit_train_batches")
    assert (tmp_path / "a" / "checkpoints" / "step=3").is_dir()


@pytest.mark.parametrize(
    ("recipe", "key", "value"),
    [
        ("block_causal", "warmup_steps", "{}"),
        ("block_causal", "block_schedule", "{{sizes: [2, 4], steps: {}}}"),
        ("complementary_mask", "block_schedule", "{{sizes: [2, 4], steps: {}}}"),
        ("full_bidirectional", "annealing_steps", "{}"),
    ],
)
@pytest.mark.parametrize("steps", [6, 7])
def test_what_lasts_longer_than_the_run_is_said(recipe, key, value, steps, typed, small, tmp_path):
    words = small(**{"model__warmup_steps": 0, f"model__{key}": value.format(steps)})
    said = typed("fit", recipe, *words, "trainer.callbacks=[]", "--run", "a", cwd=tmp_path)
    assert said.code == 0, said.err
    expected = [f"note: model.{key} lasts 7 steps, the whole run 6"] if steps > 6 else []
    assert [line for line in said.out.splitlines() if line.startswith("note")] == expected


@pytest.mark.parametrize("steps", [-1, 0])
def test_a_run_needs_a_length(steps, refused, small, tmp_path):
    said = refused("fit", "block_causal", *small(trainer__max_steps=steps), cwd=tmp_path)
    assert said.startswith("trainer.max_steps must be set")


def test_a_recipe_refuses_a_masking_that_it_does_not_take(refused, small, tmp_path):
    said = refused(
        "fit", "complementary_mask", *small(), "model.noise={masking: exact, weight: count_ratio}", cwd=tmp_path
    )
    assert said == "noise.masking: exact does not go with ComplementaryMask, which takes complementary"


@pytest.fixture
def source(source_folder, tmp_path) -> Path:
    """A source that a test may damage."""
    return shutil.copytree(source_folder("qwen3", tied=True), tmp_path / "source")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", None, "model.source: {} holds a config but no weights (model.safetensors)"),
        ("config.json", None, "model.source: {} holds no model (no config.json in it)"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}},
            "model.source: {} lacks model-00001-of-00002.safetensors",
        ),
        (
            "config.json",
            {"model_type": "qwen33"},
            "{} is of model_type qwen33, which transformers",
        ),
        ("config.json", "{", "{}/config.json"),
        ("model.safetensors", "short", "model.source: {}/model.safetensors is damaged"),
        ("tokenizer.json", None, "model.source: {} holds no tokenizer"),
    ],
)
def test_a_damaged_source(file, content, says, refused, small, source):
    (source / file).unlink(missing_ok=True)
    if content is not None:
        (source / file).write_text(content if isinstance(content, str) else json.dumps(content))
    said = refused("fit", "block_causal", *small(model__source=source), cwd=source.parent)
    assert says.format(source) in said


# What the parser's own reports become


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("model"), "'model'"),
        (RuntimeError(), "RuntimeError"),
        (FileNotFoundError(2, "No such file", "x.yaml"), "[Errno 2] No such file: 'x.yaml'"),
    ],
)
def test_other_errors_say_what_they_say_in_one_line(error, says):
    assert sentence(error) == says


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trainer.max_time=00:01:00:00", "trainer.max_time must be null: a run's length is its max_steps"),
        ("trainer.num_nodes=2", "trainer.num_nodes=2 needs a launcher on each node: torchrun, or SLURM"),
    ],
)
def test_what_would_end_early_or_wait_for_ever(word, says, refused, small, tmp_path):
    assert refused("fit", "block_causal", *small(), word, cwd=tmp_path).startswith(says)
