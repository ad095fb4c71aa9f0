"""The program that this process runs, so that further ranks can run the same one.

`moetrain` itself is started again as `python -m moetrain`. A program of a user that ends in

    sys.exit(main(convert_model=..., language_loss=...))

is started again as it was started, because only its own code knows what it hands over. Imports no torch.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from moetrain.errors import ConfigError

MOETRAIN = ("-m", "moetrain")


class Program(NamedTuple):
    """How to start what this process runs, and what its user hands to training, evaluation and generation."""

    command: tuple[str, ...] | None = MOETRAIN  # words between `python` and the verb; None: not known
    convert_model: Callable[..., None] | None = None
    language_loss: Any = None                   # a LanguageLoss; its class imports torch

    def words(self, argv: list[str]) -> list[str]:
        """Words of a process that runs this program with other arguments.

        Raises ConfigError where the program cannot be started again.
        """
        if self.command is None:
            raise ConfigError(
                232, "main() was given words and convert_model or language_loss, and needs more processes",
                where="the call of main()",
                why="they would be started as `python -m moetrain`, which knows neither",
                next="a script that ends in sys.exit(main(convert_model=...)) and takes its words from "
                     "the command line; or run.nproc=1")
        return [sys.executable, *self.command, *argv]


def program_of(convert_model: Callable[..., None] | None, language_loss: Any, *,
               from_command_line: bool) -> Program:
    """Describe the program of this process.

    Args:
        convert_model: what its user hands over; None in `moetrain` itself.
        language_loss: the same.
        from_command_line: whether all words of the command line go to moetrain.
    """
    if convert_model is None and language_loss is None:
        return Program()
    if not from_command_line:
        return Program(None, convert_model, language_loss)
    before = len(sys.orig_argv) - len(sys.argv[1:])  # python and its options, then script or -m module
    return Program(tuple(sys.orig_argv[1:before]), convert_model, language_loss)
