"""The program that this process runs, so that further ranks can run the same one.

`moetrain` itself is started again as `python -m moetrain`. A program of a user that ends in

    sys.exit(main(convert_model=...))

is started again as it was started, because only its own code knows what it hands over. Imports no torch.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

from moetrain.errors import ConfigError

MOETRAIN = ("-m", "moetrain")


class Program(NamedTuple):
    """How to start what this process runs, and what its user hands to training, evaluation and generation."""

    command: tuple[str, ...] | None = MOETRAIN  # words between `python` and the verb; None: not known
    convert_model: Callable[..., None] | None = None

    def words(self, argv: list[str]) -> list[str]:
        """Words of a process that runs this program with other arguments.

        Raises ConfigError where the program cannot be started again.
        """
        if self.command is None:
            raise ConfigError(
                232, "main() was given words and convert_model, and further processes are needed",
                where="the call of main()",
                why="they would be started as `python -m moetrain`, which does not know convert_model",
                next="a script that ends in sys.exit(main(convert_model=...)) and takes its words from "
                     "the command line; or run.nproc=1")
        return [sys.executable, *self.command, *argv]


def program_of(convert_model: Callable[..., None] | None, *, from_command_line: bool) -> Program:
    """Describe the program of this process.

    Args:
        convert_model: what its user hands over; None in `moetrain` itself.
        from_command_line: whether all words of the command line go to moetrain.
    """
    if convert_model is None:
        return Program()
    if not from_command_line:
        return Program(None, convert_model)
    before = len(sys.orig_argv) - len(sys.argv[1:])  # python and its options, then script or -m module
    return Program(tuple(sys.orig_argv[1:before]), convert_model)
