"""The errors a user can cause, one class per exit code.

    MoETrainError
    ├── UserCodeError     1   an exception in a part or script of somebody else
    ├── ConfigError       2   a key, a value or a combination that cannot work
    │   └── ConfigErrors      all of one command, together
    ├── Preempted        10   told to stop, and saved
    ├── NonFiniteError   11   a loss or a gradient norm is not a number
    ├── DataError        12   missing, damaged or altered data
    ├── CheckpointError  13   missing, damaged or foreign checkpoint
    ├── DiskError        14   a directory that cannot be written
    ├── RendezvousError  15   the ranks did not find each other
    ├── PeerError        16   a rank was lost, or hangs
    ├── CrashLoopError   17   restarted too often at the same step
    └── OutOfMemoryError 18   an allocation failed while training

Every error has a code `E-<AREA>-<n>` and four parts: what, where (key or file), why, what to type next.
"""

from collections.abc import Sequence

from moetrain.files import shown

CONTINUED = "\n" + 10 * " "       # in a part: goes on in the next line, below its beginning


class MoETrainError(Exception):
    """Base class; `code` is the exit code of the process."""

    code = 1
    area = "ERROR"

    def __init__(self, number: int, what: str, *, where: str, why: str, next: str) -> None:
        self.id = f"E-{self.area}-{number:03d}"
        self.what, self.where, self.why, self.next = what, where, why, next
        super().__init__(str(self))

    def __str__(self) -> str:
        """On the terminal: parts hold names and texts from outside, whose control characters are escaped."""
        what, where, why, next = (CONTINUED.join(map(shown, str(part).split(CONTINUED)))
                                  for part in (self.what, self.where, self.why, self.next))
        return f"{self.id}  {what}\n  where   {where}\n  why     {why}\n  try     {next}"


class UserCodeError(MoETrainError):
    code, area = 1, "CODE"


class ConfigError(MoETrainError):
    code, area = 2, "CONFIG"


class ConfigErrors(ConfigError):
    """Every configuration error of one command."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        self.id = errors[0].id
        Exception.__init__(self, str(self))

    def __str__(self) -> str:
        return "\n\n".join(str(error) for error in self.errors)


class Preempted(MoETrainError):
    code, area = 10, "PREEMPTED"


class NonFiniteError(MoETrainError):
    code, area = 11, "NONFINITE"


class DataError(MoETrainError):
    code, area = 12, "DATA"


class CheckpointError(MoETrainError):
    code, area = 13, "CHECKPOINT"


class DiskError(MoETrainError):
    code, area = 14, "DISK"


class RendezvousError(MoETrainError):
    code, area = 15, "RENDEZVOUS"


class PeerError(MoETrainError):
    code, area = 16, "PEER"


class CrashLoopError(MoETrainError):
    code, area = 17, "LOOP"


class OutOfMemoryError(MoETrainError):
    code, area = 18, "MEMORY"
