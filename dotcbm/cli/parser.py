"""An argument parser that guesses what was meant, for the commands that need no Lightning."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from dotcbm.cli.suggest import nearest

__all__ = ["Parser", "device"]


class Parser(argparse.ArgumentParser):
    """argparse with near matches for misspelt options, and no abbreviations (they break when an option is added)."""

    def __init__(self, command: str, description: str, *, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"dotcbm {command}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, with the nearest option, and leave with status 2."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            message += nearest(word, known)
        self.exit(2, f"{self.prog}: {message}\n  {self.prog} --help lists the options\n")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """`parse_args`, with pictures and options in any order."""
        return self.parse_intermixed_args(list(arguments))


def device(name: str) -> str:
    """The type of `--device`: a name that torch knows, of hardware that is there.

    Raises:
        argparse.ArgumentTypeError: It is not; says what to give.
    """
    import torch

    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason[:120]}); give cpu, or cuda where there is a GPU") from None
    return name
