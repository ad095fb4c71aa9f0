"""Result of one check of a part, and the run of many."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

from moetrain.errors import MoETrainError
from moetrain.user_code import of_user

Subject = TypeVar("Subject")


class NotTried(Exception):
    """Raised by a check that does not apply to its subject, with the reason."""


class Check(NamedTuple):
    """One promise of a part.

    Attributes:
        name: what is promised, as a sentence without its period.
        holds: raises AssertionError with what was seen where it is broken, NotTried where it does not apply.
        advice: what to change where it is broken.
    """

    name: str
    holds: Callable[[], None]
    advice: str


class Finding(NamedTuple):
    """A check that has run.

    Attributes:
        name: what is promised.
        problem: what was seen instead; None where the promise holds.
        advice: what to change.
        not_tried: why the promise does not apply; None where it was tried.
    """

    name: str
    problem: str | None
    advice: str = ""
    not_tried: str | None = None


def checks_of(promises: Mapping[str, tuple[Callable[[Subject], None], str]],
              subject: Subject) -> Iterator[Check]:
    """List the checks of a subject: by promise, the function that tries it, and what to change."""
    for name, (holds, advice) in promises.items():
        yield Check(name, partial(holds, subject), advice)


def findings(checks: Iterable[Check]) -> Iterator[Finding]:
    """Run checks one after another, and yield what each found."""
    for check in checks:
        try:
            yield Finding(check.name, _problem(check.holds), check.advice)
        except NotTried as reason:
            yield Finding(check.name, None, check.advice, str(reason))


def _problem(holds: Callable[[], None]) -> str | None:
    try:
        holds()
    except NotTried:
        raise
    except AssertionError as broken:
        return " ".join(str(broken).split()) or "it does not"
    except MoETrainError as error:
        return error.what
    except Exception as error:                               # of the part, which may raise anything
        theirs = of_user(error)
        place = f" ({theirs.where})" if theirs else ""
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"
    return None
