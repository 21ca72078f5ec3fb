"""The command line. Every command is one module here; none is imported before it is asked for, so `dotcbm --help` is instant.

Exit status: 0 done; 1 the data, the model or the disk is at fault; 2 the command line or the config is; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("dotcbm.cli.demo", "Train on drawn creatures and draw what was seen: two minutes, no download"),
    "fit": ("dotcbm.cli.train", "Train a model as a YAML config says, or go on with a run that was stopped"),
    "validate": ("dotcbm.cli.train", "Measure a checkpoint on the validation pictures"),
    "test": ("dotcbm.cli.train", "Measure a checkpoint on the test splits: a table and a JSON file"),
    "predict": ("dotcbm.cli.predict", "Write concept and class probabilities of pictures as Parquet or CSV"),
    "explain": ("dotcbm.cli.explain", "Show which concepts were seen where, and how the class follows"),
    "export": ("dotcbm.cli.export", "Write a model as torch.export program or ONNX file, compared with the original"),
    "audit": ("dotcbm.cli.audit", "Say what a model gets wrong, where it looks and what its concepts are worth: one HTML file"),
    "compare": ("dotcbm.cli.compare", "Put several audits side by side, with intervals of the differences"),
    "edit": ("dotcbm.cli.edit", "Remove or re-weight concepts, fit the class head anew, and show what that changed"),
    "grow": ("dotcbm.cli.grow", "Make a larger model from a trained one: more layers, more experts"),
    "study": ("dotcbm.cli.study", "Train many methods on several seeds and compare them in one table"),
    "list": ("dotcbm.cli.listing", "List data sources, encoders, models, configs or metrics"),
    "doctor": ("dotcbm.cli.doctor", "Say what is installed, what is cached and what is missing"),
}

# Packages of the extras; whoever lacks one of an extra needs all of them.
_TRAIN = ("jsonargparse", "lightning", "pyarrow", "torchmetrics")
_AUDIT = ("jinja2", "scipy")
_TRAINING = ("audit", "demo", "edit", "fit", "grow", "study", "test", "validate")
_AUDITING = ("audit", "edit")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: What follows `dotcbm` on the command line; `sys.argv[1:]` by default.

    Returns:
        The exit status; see the head of this file. DOTCBM_TRACEBACK=1 in the environment shows where an error comes from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from dotcbm import __version__

        print(f"dotcbm {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean `dotcbm {near[0]}`?" if near else f"; the commands are {', '.join(COMMANDS)}"
        print(f"dotcbm: there is no command {command!r}{hint}", file=sys.stderr)
        return 2
    needed = (*(_TRAIN if command in _TRAINING else ()), *(_AUDIT if command in _AUDITING else ()))
    if missing := next((name for name in needed if find_spec(name) is None), None):
        return _missing(command, missing)
    try:
        module = import_module(COMMANDS[command][0])
        return module.run(command, rest)
    except SystemExit as done:  # argparse leaves by this door
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        print(f"\ndotcbm {command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None and not _traceback_wanted():  # one of ours, which says what to install
            print(f"dotcbm {command}: {error}", file=sys.stderr)
            return 2
        if error.name is None or error.name.partition(".")[0] not in (*_TRAIN, *_AUDIT) or _traceback_wanted():
            raise
        return _missing(command, error.name)
    except (ValueError, OSError) as error:
        if _traceback_wanted():
            raise
        print(f"dotcbm {command}: {error}", file=sys.stderr)
        return 1


def _missing(command: str, package: str) -> int:
    extra = "audit" if package.partition(".")[0] in _AUDIT else "train"
    print(f'dotcbm {command} needs {package}, which is not installed: pip install "dotcbm[{extra}]"', file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dotcbm <command> [options]",
            "",
            "Vision models that explain themselves by construction: concepts, where each was read from, and the class that follows.",
            "",
            "commands:",
            *rows,
            "",
            "  dotcbm <command> --help  the options of a command",
            "  dotcbm --version         the version",
        ]
    )


def _traceback_wanted() -> bool:
    return os.environ.get("DOTCBM_TRACEBACK", "") not in ("", "0")
