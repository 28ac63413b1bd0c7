"""The command line. It imports no torch until a command needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from dlm_lightning import __version__, interruption, runs
from dlm_lightning.commands import COMMANDS
from dlm_lightning.commands.arguments import about
from dlm_lightning.errors import sentence

PATIENCE = 10  # seconds that a rank which failed leaves to the first one of its machine, to say why


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors become one sentence on stderr and exit code 1 (2 for a wrong command line)."""
    warnings.showwarning = lambda message, *_: print(f"dlm: {message}", file=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["fit"], ["resume"]):
        interruption.hold()
    try:
        COMMANDS[_command(argv[:1])](argv[1:])
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # nobody reads on, as with `dlm list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("dlm: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("DLM_DEBUG") == "1":
            raise
        if runs.is_first_of_node() or _joined():
            print(f"dlm: {sentence(error)}", file=sys.stderr)
        else:  # a launcher ends all ranks when one has ended
            interruption.outlive(os.getppid(), PATIENCE)
        return 1


def _command(word: list[str]) -> str:
    """The command that is asked for; help, the version, or a word that is none ends the process."""
    parser = argparse.ArgumentParser(prog="dlm", description="Turn autoregressive language models into diffusion ones.")
    parser.add_argument("--version", action="version", version=f"dlm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=about(command), add_help=False)
    return parser.parse_args(word).command


def _joined() -> bool:
    """Whether the ranks have met; until then all of a machine fail alike."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(main())
