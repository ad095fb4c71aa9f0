"""Errors that a user can cause, one class for each exit code.

    MoETrainError
    ├── UserCodeError     1   an exception in a part or script that is not moetrain's
    ├── ConfigError       2   a key, a value or a combination that cannot work
    │   └── ConfigErrors      all of one command, together
    ├── Preempted        10   told to stop, and saved
    ├── NonFiniteError   11   a loss or a gradient norm is not a number
    ├── DataError        12   missing, damaged or altered data
    ├── CheckpointError  13   missing, damaged or incompatible checkpoint
    ├── DiskError        14   a directory that cannot be written
    ├── RendezvousError  15   the ranks did not find each other
    ├── PeerError        16   a rank was lost or hangs
    ├── CrashLoopError   17   restarted too often at the same step
    └── OutOfMemoryError 18   an allocation failed while training

Every error has a code `E-<AREA>-<n>` and four parts: what, where (key or file), why, what to type next.
"""

from collections.abc import Sequence

from moetrain.files import shown

# Separator inside a part that continues it on the next line, below its beginning.
CONTINUED = "\n" + 10 * " "


class MoETrainError(Exception):
    """Base class: an id and four parts. `code` is the exit code of the process.

    Args:
        number: number of the error within its area.
        what: what is wrong.
        where: key, file or rank that is concerned.
        why: the reason, with both sides of a contradiction.
        next: what to type or do next.
    """

    code = 1
    area = "ERROR"

    def __init__(self, number: int, what: str, *, where: str, why: str, next: str) -> None:
        self.id = f"E-{self.area}-{number:03d}"
        self.what, self.where, self.why, self.next = what, where, why, next
        super().__init__(str(self))

    def __str__(self) -> str:
        """Write the error for a terminal, with control characters of foreign names and texts escaped."""
        what, where, why, next = (CONTINUED.join(map(shown, str(part).split(CONTINUED)))
                                  for part in (self.what, self.where, self.why, self.next))
        return f"{self.id}  {what}\n  where   {where}\n  why     {why}\n  try     {next}"


class UserCodeError(MoETrainError):
    """An exception in a part or script that is not moetrain's."""

    code, area = 1, "CODE"


class ConfigError(MoETrainError):
    """A key, a value or a combination that cannot work."""

    code, area = 2, "CONFIG"


class ConfigErrors(ConfigError):
    """All configuration errors of one command."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        self.id = errors[0].id
        Exception.__init__(self, str(self))

    def __str__(self) -> str:
        return "\n\n".join(str(error) for error in self.errors)


class Preempted(MoETrainError):
    """The run was told to stop, and has saved."""

    code, area = 10, "PREEMPTED"


class NonFiniteError(MoETrainError):
    """A loss or a gradient norm is not finite."""

    code, area = 11, "NONFINITE"


class DataError(MoETrainError):
    """Missing, damaged or altered data."""

    code, area = 12, "DATA"


class CheckpointError(MoETrainError):
    """Missing, damaged or incompatible checkpoint."""

    code, area = 13, "CHECKPOINT"


class DiskError(MoETrainError):
    """A file or directory that cannot be written."""

    code, area = 14, "DISK"


class RendezvousError(MoETrainError):
    """The ranks did not find each other."""

    code, area = 15, "RENDEZVOUS"


class PeerError(MoETrainError):
    """A rank was lost or hangs."""

    code, area = 16, "PEER"


class CrashLoopError(MoETrainError):
    """The run was restarted too often at the same step."""

    code, area = 17, "LOOP"


class OutOfMemoryError(MoETrainError):
    """An allocation failed in training."""

    code, area = 18, "MEMORY"


def exit_code(error: BaseException) -> int:
    """Exit code of a process that an exception ends, as Python has it: that of `sys.exit("a text")` is 1."""
    if isinstance(error, MoETrainError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) else int(code is not None)
