"""`dlm compare`, killed and repeated; the report of its runs, in a browser where there is one; what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dlm_lightning import checkpoint, evaluation
from dlm_lightning.comparison import steps_of
from dlm_lightning.comparison.arms import check_same_work, parsed, taken
from dlm_lightning.comparison.processes import alive, alone
from dlm_lightning.comparison.request import Budget, Comparison

ARMS = ("full_bidirectional", "block_causal", "control")
STEPS = 5
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
OVERFLOW = """<script>
addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const cut = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const own = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < own.left - 1 || box.right > own.right + 1 || box.top < own.top - 1 || box.bottom > own.bottom + 1)
        cut.push(text.textContent);
    }
  }
  const style = getComputedStyle(document.body);
  document.body.dataset.seen = JSON.stringify({wide, cut, ink: style.color, paper: style.backgroundColor});
});
</script>"""


def without_length(overrides: list[str]) -> list[str]:
    """Overrides without those of a run's length, which a comparison has a budget for."""
    return [word for word in overrides if not word.startswith(("trainer.max_steps", "trainer.val_check_interval"))]


@pytest.fixture(scope="module")
def compared(small, row_cache, tmp_path_factory) -> tuple[Path, str]:
    """A comparison that was killed while its second run trained and then repeated; and what the repetition said."""
    folder = tmp_path_factory.mktemp("compare")
    overrides = without_length(small(model__block_size=4, data__batch_size=2))
    command = [sys.executable, "-m", "dlm_lightning.cli", "compare", *ARMS[:2], *overrides]
    command += ["--steps", str(STEPS), "--run", "here", "--tasks", "copy", "--prompts", "2"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(row_cache), "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    second_run = folder / "here" / "runs" / f"{ARMS[1]}-0"
    until = time.monotonic() + 500
    try:
        while not (second_run / "metrics.csv").is_file():
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < until, "too slow"
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    finished = (folder / "here" / "runs" / f"{ARMS[0]}-0" / "metrics.csv").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "here" / "runs" / f"{ARMS[0]}-0" / "metrics.csv").stat().st_mtime_ns == finished
    return folder / "here", done.stdout


def test_a_killed_comparison_goes_on_and_completes(compared):
    place, said = compared
    assert f"{ARMS[0]}, seed 0: {STEPS} steps, was there" in said
    for arm in ARMS:
        run = place / "runs" / f"{arm}-0"
        assert checkpoint.load(checkpoint.newest(run) / checkpoint.STATE)["global_step"] == STEPS
        assert evaluation.load(run)["step"] == STEPS
    assert said.endswith(f"report: {place / 'report.html'}\n")


def test_arms_share_source_data_noise_and_schedule(compared):
    place, _ = compared
    configs = [yaml.safe_load((place / "runs" / f"{arm}-0" / "config.yaml").read_text()) for arm in ARMS]
    assert configs[0]["data"] == configs[1]["data"] == configs[2]["data"]
    for config in configs[1:]:
        for key in ("source", "lr", "min_lr_ratio", "warmup_steps", "weight_decay", "betas"):
            assert config["model"]["init_args"][key] == configs[0]["model"]["init_args"][key]
        assert config["trainer"]["max_steps"] == STEPS
    assert [config["model"]["class_path"].split(".")[-2] for config in configs] == [*ARMS[:2], "ar_source"]


def test_the_report_has_every_arm_and_needs_nothing_else(compared):
    place, _ = compared
    page, markdown = (place / "report.html").read_text(), (place / "report.md").read_text()
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            links.extend(value for name, value in attrs if name in ("src", "href", "xlink:href") and value)

    Links().feed(page)
    assert all(link.startswith(("#", "data:image/png")) for link in links)
    assert "@import" not in page and "url(http" not in page
    for arm in ARMS:
        assert arm in page and f"| {arm} |" in markdown
    for title in ("Summary", "The common yardstick", "What is left of the AR source", "Work and speed", "Commands"):
        assert title in page and title in markdown
    for title in ("Curves", "Weight drift", "Drift by layer and module", "Where the loss is", "Samples"):
        assert title in page
    assert "Every arm made 5 optimizer steps" in page
    assert "model.seed" not in markdown and "trainer.default_root_dir" not in markdown


def test_the_report_says_what_was_measured(compared):
    place, _ = compared
    [row] = [
        line for line in (place / "report.md").read_text().splitlines() if line.startswith("| block_causal | masked")
    ]
    bound = evaluation.load(place / "runs" / "block_causal-0")["bound"]["masked"]
    assert row.split(" | ")[2:5] == [f"{bound[size]:.3f}" for size in ("1", "4", "16")]


def test_forward_tokens_are_counted_as_they_are_shown(compared):
    place, _ = compared
    per_step = [evaluation.load(place / "runs" / f"{arm}-0")["work"]["forward_tokens_per_step"] for arm in ARMS]
    assert per_step == [2 * 24, 2 * 2 * 24, 2 * 24]


def test_a_report_of_single_runs_and_where_it_goes(compared, typed, tmp_path):
    place, _ = compared
    runs = [place / "runs" / f"{arm}-0" for arm in ARMS[:2]]
    assert typed("report", *runs, cwd=tmp_path).code == 0
    assert ARMS[1] in (tmp_path / "report.html").read_text()
    assert "control" not in (tmp_path / "report.md").read_text()
    before = (place / "report.md").read_text()
    assert typed("report", place, cwd=tmp_path).out == f"{place / 'report.html'}\n"
    assert (place / "report.md").read_text() == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at the report with")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_it_whole_in_light_and_dark(compared, scheme, width, tmp_path):
    place, _ = compared
    page = tmp_path / "page.html"
    page.write_text((place / "report.html").read_text().replace("</body>", OVERFLOW + "</body>"))
    settings = f"preferredColorScheme={0 if scheme == 'dark' else 1}"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings={settings}", "--enable-logging=stderr"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    found = re.search(r"data-seen=\"([^\"]*)\"", done.stdout)
    seen = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert seen["cut"] == [] and seen["wide"] <= 0
    light = [sum(map(int, re.findall(r"\d+", seen[part])[:3])) for part in ("ink", "paper")]
    assert (light[0] > light[1]) == (scheme == "dark") and abs(light[0] - light[1]) > 400


def test_overrides_go_to_the_arms_that_take_them():
    words = ["model.block_size=8", "model.lr=1e-3", "data.seed=1", "--trainer.devices=1"]
    assert taken("block_causal", words) == words
    assert taken("full_bidirectional", words) == words[1:]


def test_budgets_share_out_work(small, tmp_path):
    """Forward tokens: a row costs 1, 2 or 3 times its length; steps: the same for all; less than a step is refused."""
    names = ("full_bidirectional", "block_causal", "complementary_mask")
    recipe_of = dict(zip(names, names, strict=True))

    def steps(unit: str, amount: float | None, **more) -> list[int]:
        overrides = small(data__batch_size=2, **more)
        wanted = Comparison(recipe_of, overrides, 1, Budget(unit, amount), False, None, 0)
        return list(steps_of(recipe_of, wanted, None).values())

    assert steps("forward_tokens", 1440) == [30, 15, 10]
    assert steps("steps", 7) == [7, 7, 7]
    assert steps("steps", None, trainer__max_steps=9) == [9, 9, 9]
    with pytest.raises(ValueError, match="less than a step of complementary_mask, which takes 144 forward_tokens"):
        steps("forward_tokens", 143)


def test_optimizers_that_differ_are_noted_and_data_that_differs_is_refused(small):
    def of(**more):
        return parsed({"x": "block_causal"}, small(**more))["x"]

    a, b, c = of(model__lr=1e-3), of(model__lr=2e-3), of(data__row_length=32)
    assert check_same_work({"a": a, "b": b}) == ["model.lr is 0.001 in a and 0.002 in b"]
    with pytest.raises(ValueError, match=r"do not do the same work: data.row_length is 24 in a and 32 in c"):
        check_same_work({"a": a, "c": c})


def test_processes_are_gone_with_what_began_them(tmp_path):
    """The lock is held by what a comparison leaves behind, and let go when the last of it has left."""
    left_behind = subprocess.Popen(
        [sys.executable, "-c", LEAVES_A_CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(left_behind.stdout.readline())
    left_behind.kill()
    left_behind.wait()
    began = time.monotonic()
    with alone(tmp_path, str(tmp_path), 1):
        assert time.monotonic() - began > 0.5
        assert not alive(child)
        with pytest.raises(ValueError, match="another process is comparing"), alone(tmp_path, str(tmp_path), 1):
            pass


LEAVES_A_CHILD = """
import subprocess, sys, time
from pathlib import Path
from dlm_lightning.comparison import processes
with processes.alone(Path(sys.argv[1]), sys.argv[1], 1) as own:
    slow = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), exit(143))); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", slow], pass_fds=[own.lock.fileno()],
                             preexec_fn=processes._end_with(processes.os.getpid()))
    time.sleep(0.5)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def recipe(folder: Path, name: str, text: str = "") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    shipped = Path(__file__).parents[1] / "recipes" / "block_causal.yaml"
    path.write_text(f"extends: [{shipped}]\n{text}")
    return str(path)


def test_what_cannot_be_compared_is_refused_in_a_sentence(refused, small, tmp_path):
    overrides, cwd = without_length(small()), tmp_path
    twin = recipe(tmp_path / "twin", "block_causal.yaml")
    longer = recipe(tmp_path, "longer.yaml", "data: {init_args: {row_length: 32}}\ntrainer: {max_steps: 9}\n")
    assert "there is no recipe blok_causal; did you mean block_causal?" in refused("compare", "blok_causal", cwd=cwd)
    assert "two arms would be called block_causal" in refused("compare", "block_causal", twin, *overrides, cwd=cwd)
    no_row = [word for word in overrides if "row_length" not in word]
    assert "data.row_length is 128 in block_causal and 32 in longer" in refused(
        "compare", "block_causal", longer, *no_row, cwd=cwd
    )
    for words, message in (
        (["model.blok=3"], "none of the recipes takes model.blok"),
        (["--seeds", "0"], "--seeds must be at least 1 and at most 1000, not 0"),
        (["--seeds", "1000000000"], "at most 1000, not 1000000000"),
        (["--jobs", "0"], "--jobs must be at least 1 and at most 1000, not 0"),
        (["data.seed=3"], "data.seed is the comparison's to say: --seeds"),
        (["trainer.max_steps=3", "--steps", "2"], "trainer.max_steps is the comparison's to say: --steps"),
        (["=3"], "=3 is no override; write key=value"),
        (["--forward-tokens", "1e300"], "1e+09 are the most"),
        (["--forward-tokens", "5", "--run", "few"], "the budget is less than a step of block_causal"),
        (["--run", " "], "--run needs the name of a folder"),
        (["--run", "longer.yaml/x"], "cannot be made: Not a directory"),
        (["--steps", "0"], "--steps must be above 0 and finite, not 0"),
        (["--forward-tokens", "-1"], "--forward-tokens must be above 0 and finite, not -1"),
        (["--tasks", "copy,dance"], "there is no task dance"),
        (["--prompts", "-1"], "--prompts must be at least 0"),
    ):
        assert message in refused("compare", "block_causal", *overrides, *words, cwd=cwd)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    assert "already holds something else" in refused("compare", "block_causal", *overrides, "--run", "full", cwd=cwd)


def test_a_run_that_was_trained_is_never_thrown_away(compared, typed):
    """Nor is it trained again: a finished run that lost its config is named, and the report has the others."""
    place, _ = compared
    plan = json.loads((place / "comparison.json").read_text())
    config = place / "runs" / f"{ARMS[1]}-0" / "config.yaml"
    text = config.read_text()
    config.unlink()
    words = [*ARMS[:2], *plan["overrides"], "--steps", STEPS, "--run", "here", "--tasks", "copy", "--prompts", 2]
    said = typed("compare", *words, cwd=place.parent)
    config.write_text(text)
    assert said.code == 1 and "has the others" in said.err
    assert checkpoint.newest(config.parent)


def test_what_is_damaged_is_named(compared, typed, tmp_path):
    """A measure that cannot be read is said and left out; a run that cannot be read is refused by its file."""
    place, _ = compared
    for name, content, code, message in (
        ("evaluation.json", "{", 0, "measures the run again"),
        ("evaluation.json", "[]", 0, "measures the run again"),
        ("origin.json", "{}", 1, "origin.json is damaged: it has no origin"),
        ("config.yaml", "", 1, "config.yaml is damaged"),
        ("metrics.csv", "step,val/nelbo\nx,1\n", 1, "metrics.csv is damaged"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(place / "runs" / f"{ARMS[0]}-0", copy)
        (copy / name).write_text(content)
        said = typed("report", copy, cwd=tmp_path)
        assert said.code == code and message in said.err + said.out, (name, said)
        shutil.rmtree(copy)


def test_a_run_that_was_measured_otherwise_is_pointed_out(compared, typed, tmp_path):
    place, _ = compared
    shutil.copytree(place / "runs" / f"{ARMS[1]}-0", tmp_path / "copy")
    assert typed("eval", tmp_path / "copy", "--prompts", 0, "data.val_rows=2", cwd=tmp_path).code == 0
    assert typed("report", tmp_path / "copy", cwd=tmp_path).code == 0
    assert "| block_causal | 0 | measured with data.val_rows=2 |" in (tmp_path / "report.md").read_text()


def test_another_comparison_in_the_folder_is_refused(compared, refused, small):
    place, _ = compared
    said = refused("compare", *ARMS[:2], *without_length(small()), "--steps", STEPS, "--run", "here", cwd=place.parent)
    assert "holds a comparison with overrides" in said


def test_a_comparison_under_way_is_not_joined(compared, refused):
    place, _ = compared
    plan = json.loads((place / "comparison.json").read_text())
    words = [*ARMS[:2], *plan["overrides"], "--steps", STEPS, "--run", "here", "--tasks", "copy", "--prompts", 2]
    with alone(place, str(place), 1):
        assert "another process is comparing" in refused("compare", *words, cwd=place.parent)
