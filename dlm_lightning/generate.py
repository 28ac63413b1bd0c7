"""`dlm generate`: what a run's model makes of prompts, by a decoder from a short YAML, its plan."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch._dynamo.exc import TorchDynamoException

from dlm_lightning import runs
from dlm_lightning.catalog import nearest, plans
from dlm_lightning.data import conversations
from dlm_lightning.data.records import Malformed
from dlm_lightning.decode.canvas import Canvas
from dlm_lightning.decode.decoder import Decoded, check_prompts, compiled, decode
from dlm_lightning.decode.plan import Plan
from dlm_lightning.denoiser import Denoiser
from dlm_lightning.errors import check_plan_nulls
from dlm_lightning.module import Recipe
from dlm_lightning.parsing import quiet
from dlm_lightning.reopening import restore
from dlm_lightning.view import AUTOREGRESSIVE

MASKED = "░"


def generate(
    run: str,
    plan: str | None,
    overrides: Sequence[str],
    prompts: Sequence[str],
    jsonl: str | None = None,
    out: str | None = None,
    chat: bool = False,
    batch: int = 8,
    device: str | None = None,
    precision: str = "32-true",
    compile_network: bool = False,
) -> None:
    """Continue prompts, or those of a JSONL file, and print text and figures; `out` or stdout takes JSON lines.

    A line of a JSONL file has a `prompt` or, for the chat template, `messages`; its other keys are passed on. `plan` is
    a shipped one's name or a YAML, by default what suits the model's pattern; `precision` is that of the weights,
    32-true or bf16-true, whatever they were trained in. Raises ValueError or FileNotFoundError for input that cannot be
    decoded, before anything is.
    """
    quiet()
    logging.getLogger("dlm_lightning").handlers = [logging.StreamHandler()]  # stdout is for the text alone
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, not {batch}")
    records = list(_records(jsonl)) if jsonl else [{"prompt": prompt} for prompt in prompts]
    if not records:
        raise ValueError(f"{jsonl} holds no prompts")
    place = Path(out).expanduser() if out else None
    if place and place.exists():
        raise FileExistsError(f"{out} is there already; name a new file by --out")
    if place and not place.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {place.parent}")
    chosen = read(plan, overrides) if plan else None
    folder, recipe, _ = restore(run, f"--trainer.precision={precision}")
    tokenizer = recipe.tokenizer
    data = yaml.safe_load((folder / runs.CONFIG).read_text())["data"]["init_args"]
    template = conversations.template(data.get("chat_template")) or tokenizer.chat_template
    denoiser = recipe.eval().denoiser.to(_device(device))
    asked = chat or any("messages" in record for record in records)
    if asked and not template:
        raise ValueError(
            "the run has no chat template, in data.chat_template or its tokenizer; prompts alone need none"
        )
    chosen = chosen or read(suited(denoiser), overrides)
    chosen.check(denoiser)
    if compile_network:
        compiled(denoiser)
    ids = [_tokens(tokenizer, record, template if chat or "messages" in record else None) for record in records]
    check_prompts(denoiser, ids, chosen.stopper.new_tokens)  # of all batches, before the first is written
    with _new(place) if place else nullcontext(sys.stdout) as file:
        for first in range(0, len(ids), batch):
            with _live(recipe, ids[first : first + batch]) as watch:
                options: dict[str, Any] = {"text": tokenizer.decode, "watch": watch, "first": first}
                options["eos_ids"] = [tokenizer.eos_token_id]
                try:
                    decoded = decode(denoiser, ids[first : first + batch], chosen, **options)
                except TorchDynamoException as error:
                    said = str(error).strip().splitlines()[0]
                    raise ValueError(f"--compile: torch.compile cannot compile this network here: {said}") from error
            for record, row in zip(records[first:], decoded.rows, strict=False):
                new = chosen.stopper.cut(tokenizer.decode(row.new_ids, skip_special_tokens=True))
                if jsonl:
                    file.write(
                        json.dumps(
                            {**record, "text": new, "tokens": len(row.new_ids), "forwards": row.forwards},
                            ensure_ascii=place is None,
                        )
                    )
                    file.write("\n")
                else:
                    file.write(f"{record['prompt']}{new}\n" if not chat else f"{new}\n")
            file.flush()
            print(figures(decoded), file=sys.stderr)


@contextmanager
def _new(place: Path) -> Iterator[TextIO]:
    """A file that is not there yet; it is taken away again if nothing was written to it."""
    with place.open("x", encoding="utf-8") as file:
        try:
            yield file
        finally:
            if not file.tell():
                place.unlink()


def figures(decoded: Decoded) -> str:
    """What decoding took, in a line."""
    return (
        f"{decoded.tokens:,} tokens in {decoded.forwards:,} forwards, {decoded.tokens_per_forward:.2f} per forward; "
        f"{decoded.tokens_per_second:,.1f} per second; {decoded.cached_share:.0%} of what was seen from the cache"
    )


def suited(denoiser: Denoiser) -> str:
    """The shipped plan that suits a model's pattern."""
    if denoiser.pattern == AUTOREGRESSIVE and denoiser.shift == "next_token":
        return "autoregressive"
    return "block" if denoiser.pattern.block_size else "semi_autoregressive"


def read(name: str, overrides: Sequence[str]) -> Plan:
    """The plan of a name or of a YAML's path, with overrides `key=value`; classes may lie beside the YAML."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no plan file {name}")
        if (place := str(path.parent.resolve())) not in sys.path:
            sys.path.insert(0, place)
    elif name in (known := plans()):
        path = known[name]
    else:
        raise FileNotFoundError(f"there is no plan {name}{nearest(name, known) or ';'} `dlm list` shows all")
    known_keys = [field.name for field in fields(Plan)]
    for word in overrides:
        key = word.partition("=")[0]
        name = key.rstrip("+").split(".")[0]
        if name not in known_keys:
            raise ValueError(f"there is no key {key} of a plan{nearest(name, known_keys)}")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} is no plan: a plan is keys and values")
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False, prog="dlm generate")
    parser.add_class_arguments(Plan, None)
    parser.add_argument("--config", action="config")
    config = parser.parse_args([f"--config={path}", *(f"--{word}" for word in overrides)])
    check_plan_nulls(config)
    config = parser.instantiate(config)
    return Plan(**{key: config[key] for key in known_keys})


def _device(name: str | None) -> torch.device:
    """A device by name, by default a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name}: there is no such device here") from error
    return device


def _records(path: str) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; `-` is stdin."""
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not ({"prompt", "messages"} & record.keys()):
            raise ValueError(f"{path}: line {number} has neither a prompt nor messages")
        if not isinstance(record.get("prompt", ""), str):
            raise ValueError(f"{path}: line {number}: a prompt is a text")
        if "messages" in record:
            try:
                record["messages"] = conversations.messages({"messages": record["messages"]}, "prompt", "response")
            except Malformed as error:
                raise ValueError(f"{path}: line {number} {error}") from error
        yield record


def text_of(path: str) -> str:
    """A file's text; `-` is stdin. ValueError if it is no UTF-8."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{'stdin' if path == '-' else path} is not a text in UTF-8") from error


def _tokens(tokenizer: Any, record: dict[str, Any], template: str | None) -> list[int]:
    """A record's tokens, as an answer's prompt if there is a template."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a prompt holds what is no character: half of a surrogate pair") from error
    if template is None:
        return tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    options = {"chat_template": template, "add_generation_prompt": True, "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


@contextmanager
def _live(recipe: Recipe, ids: Sequence[Sequence[int]]) -> Iterator[Callable[[Canvas], None] | None]:
    """A display of a single prompt's canvas while it is filled in, on a terminal's stderr."""
    console = Console(stderr=True, highlight=False)
    if len(ids) > 1 or not console.is_terminal:
        yield None
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda canvas: live.update(_picture(recipe, canvas), refresh=True) if len(canvas.ids_BL) else None


def _picture(recipe: Recipe, canvas: Canvas) -> Text:
    prompt, tokens = int(canvas.prompt_B[0]), canvas.visible(0)
    text = Text(recipe.tokenizer.decode(tokens[:prompt]), style="dim")
    known: list[int] = []
    for token in [*tokens[prompt:], None]:
        if token is None or token == recipe.mask_id:
            text.append(recipe.tokenizer.decode(known), style="default")
            text.append(MASKED if token is not None else "", style="yellow")
            known = []
        else:
            known.append(token)
    return text
