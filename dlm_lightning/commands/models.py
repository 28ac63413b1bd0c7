"""Commands that use a run's model, take it elsewhere, or bring one from there."""

from __future__ import annotations

from dlm_lightning.commands.arguments import PRECISIONS, add_overrides, add_run, parser_of


def generate(argv: list[str]) -> None:
    """Continue prompts with the model of a run's newest checkpoint.

    Without a prompt, stdin is one.
    """
    usage = "RUN [--prompt TEXT | --file PATH | --jsonl PATH] [--plan PLAN] [key=value …] [options]"
    parser = parser_of("generate", generate, usage)
    add_run(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    given.add_argument("--file", metavar="PATH", help="a text file that is the prompt")
    given.add_argument("--jsonl", metavar="PATH", help='lines of {"prompt": …} or {"messages": […]}; - is stdin')
    parser.add_argument("--out", metavar="PATH", help="a new file for the text, or for the lines of --jsonl")
    parser.add_argument("--plan", metavar="PLAN", help="a decoder: a YAML, or a name of `dlm list`; default by pattern")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--batch", metavar="N", type=int, default=8, help="prompts at a time; default 8")
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1; default a GPU if there is one")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the weights; default 32-true"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network first: for many prompts")
    add_overrides(parser, "of the plan, such as selector.threshold=0.8")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.generate import generate as write
    from dlm_lightning.generate import text_of

    if not args.jsonl and not args.prompt:
        args.prompt = [text_of(args.file or "-")]
    prompts, places = args.prompt or [], (args.jsonl, args.out)
    how = (args.chat, args.batch, args.device, args.precision, args.compile)
    write(args.run, args.plan, args.overrides, prompts, *places, *how)


def consolidate(argv: list[str]) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder."""
    parser = parser_of("consolidate", consolidate)
    add_run(parser)
    parser.add_argument("--out", metavar="DIR", help="a new folder; default RUN/model")
    args = parser.parse_args(argv)
    from dlm_lightning.consolidate import consolidate as gather

    print(gather(args.run, args.out))


def export(argv: list[str]) -> None:
    """Write a run's newest weights as a folder for other tools."""
    parser = parser_of("export", export)
    add_run(parser)
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--as",
        dest="form",
        choices=["hf", "ar", "sdar", "fast_dllm_v2"],
        default="hf",
        help="hf (default): a diffusion model with the code that decodes it on plain transformers; ar: a causal model; "
        "sdar, fast_dllm_v2: the layouts that engines and other code know by these names",
    )
    args = parser.parse_args(argv)
    from dlm_lightning.export import export as give

    print(give(args.run, args.out, args.form))


def import_model(argv: list[str]) -> None:
    """Make a run of a diffusion model that was trained elsewhere."""
    parser = parser_of("import", import_model)
    parser.add_argument(
        "source", metavar="FOLDER", help="a Hugging Face folder or hub id: ours, SDAR, Fast-dLLM v2, Dream, LLaDA"
    )
    add_overrides(parser, "what the folder does not state")
    parser.add_argument("--run", metavar="DIR", help="the run folder; default runs/<folder>/<number>")
    args = parser.parse_intermixed_args(argv)
    from dlm_lightning.importing import import_model as bring

    print(bring(args.source, args.overrides, args.run))
