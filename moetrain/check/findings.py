"""Result of one check of a part, and the run of many."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from moetrain.errors import MoETrainError
from moetrain.user_code import of_user


class Check(NamedTuple):
    """One promise of a part.

    Attributes:
        name: what is promised, as a sentence without its period.
        holds: raises AssertionError with what was seen where it is broken.
        advice: what to change then.
    """

    name: str
    holds: Callable[[], None]
    advice: str


class Finding(NamedTuple):
    """A check that has run; `problem` is what was seen instead of the promise, None where it holds."""

    name: str
    problem: str | None
    advice: str = ""


def findings(checks: Iterable[Check]) -> Iterator[Finding]:
    """Run checks one after another, and yield what each found."""
    for check in checks:
        yield Finding(check.name, _problem(check.holds), check.advice)


def _problem(holds: Callable[[], None]) -> str | None:
    try:
        holds()
    except AssertionError as broken:
        return " ".join(str(broken).split()) or "it does not"
    except MoETrainError as error:
        return error.what
    except Exception as error:
        theirs = of_user(error)
        place = f" ({theirs.where})" if theirs else ""
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"
    return None
