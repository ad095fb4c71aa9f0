"""The command line: `moetrain <verb> [overrides...]`, the same as `python -m moetrain <verb>`.

Each verb has a file in cli/, imported when it is named. An error that a user can cause is printed once,
without traceback (MOETRAIN_DEBUG=1 shows it). Its class gives the exit code:

    0 done · 1 a bug in moetrain, or in a part of somebody else · 2 configuration · 10 told to stop, and saved
    11 non-finite · 12 data · 13 checkpoint · 14 disk · 15 rendezvous · 16 peer lost or hung · 17 crash loop
    18 out of memory
"""

import importlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from textwrap import wrap
from typing import Any

from moetrain import streams
from moetrain.cli.help import first_keys, page
from moetrain.config.field_names import verbs_meant
from moetrain.config.groups import group_options
from moetrain.config.suggest import nearest
from moetrain.errors import ConfigError, DiskError, MoETrainError, Preempted
from moetrain.files import reason
from moetrain.launch.foreign_ranks import without_ranks
from moetrain.launch.program import Program, program_of
from moetrain.launch.rank import become_rank, has_own_stderr, rank, under_torchrun
from moetrain.user_code import of_user

VERBS = {
    "train": "train a model, or go on with a run",
    "eval": "evaluate a run on held-out text, per domain",
    "generate": "continue a text with a run's model",
    "data": "prepare text for training (data prepare)",
    "report": "draw losses and tokens per expert of a run",
    "inspect": "show what a checkpoint holds",
    "export": "write a model as a folder that other programs load",
    "import": "begin from a public model's folder",
    "check": "try the promises of a router, losses and meshes on a small model",
    "checkpoint": "check every byte of a run's checkpoints, or resize its experts",
    "slurm": "train in a Slurm job, checked before it is submitted",
    "version": "print the version",
}
# Verbs whose file cannot have their name.
_MODULES = {"import": "import_folder"}
# Verbs that may run as one of several processes that something else started.
OF_RANKS = ("train", "eval", "generate")


def main(argv: Sequence[str] | None = None, *, convert_model: Callable[..., None] | None = None,
         language_loss: Any = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: verb and overrides; None takes the words of this process, which then does nothing else.
        convert_model: changes the model before it is sharded (model/build.py). Further ranks of this machine
            run this process's program again, which has to hand over the same function.
        language_loss: takes the place of cross-entropy in training (losses/language.py), for all ranks alike.
    """
    done = _begin() if argv is None else lambda: None
    program = program_of(convert_model, language_loss, from_command_line=argv is None)
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv, program)
        if error := streams.lost():
            raise DiskError(
                30, "what was to be printed could not be written", where="standard output",
                why=reason(error),
                next="send it to a file or a terminal that takes it")
        done()
        return code
    except MoETrainError as error:
        _say(error, argv[0])
        # torchrun would restart a preempted job; status.json says 10.
        return _leave(0 if isinstance(error, Preempted) and under_torchrun() else error.code)
    except SystemExit as leaving:  # another rank failed and prints why (comm/agreement.py, all_or_none)
        return _leave(leaving.code if isinstance(leaving.code, int) else 1)
    except KeyboardInterrupt:
        return _leave(130)
    except Exception as error:
        if (theirs := of_user(error)) is None:
            raise  # a bug in moetrain, with its traceback
        _say(theirs, argv[0])
        return _leave(theirs.code)


def _say(error: MoETrainError, verb: str) -> None:
    """Print an error once.

    After the rendezvous all ranks raise the same error and one prints it. Before, a rank may be the only one
    that has it, so each prints its own.
    """
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_initialized()
    if os.environ.get("MOETRAIN_DEBUG") == "1":
        traceback.print_exc()
    elif verb in OF_RANKS and under_torchrun() and not met:
        print(f"moetrain: rank {rank()} of {os.environ.get('WORLD_SIZE', '?')}\n{error}", file=sys.stderr)
    elif verb not in OF_RANKS or has_own_stderr():
        print(error, file=sys.stderr)


def _begin() -> Callable[[], None]:
    """Prepare a process that runs nothing but moetrain; returns what to call when its work is done."""
    streams.keep_open()
    return become_rank()


def _leave(code: int) -> int:
    """Return the exit code, or end a rank with a process group at once.

    Threads of the process group, or of an abandoned rendezvous (comm/mesh.py), would abort a clean exit.
    """
    distributed = sys.modules.get("torch.distributed")
    joins = any(thread.name == "rendezvous" for thread in threading.enumerate())
    if joins or distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str], program: Program) -> int:
    verb, *rest = argv
    if verb in ("-h", "--help", "help"):
        if not rest:
            print(_help())
            return 0
        verb, *rest = *rest, "--help"
    verb = "version" if verb == "--version" else verb
    if verb not in VERBS:
        meant = verbs_meant(verb)
        near = nearest(verb, VERBS) if meant is None else meant
        raise ConfigError(42, f"there is no verb {verb}", where="the command line",
                          why=f"the verbs are {', '.join(VERBS)}",
                          next=" or ".join(f"moetrain {name}" for name in near) or "moetrain --help")
    with nullcontext() if verb in OF_RANKS else without_ranks():
        module = importlib.import_module(f"moetrain.cli.{_MODULES.get(verb, verb)}")
        if "-h" in rest or "--help" in rest:
            print(page(verb, str(module.__doc__), rest))
            return 0
        return (module.run(rest, program) if verb in OF_RANKS else module.run(rest)) or 0


def _help() -> str:
    return "\n".join([
        "moetrain <verb> [key=value ...]",
        "train sparse Mixture-of-Experts language models",
        "",
        *(f"  {verb:10s} {line}" for verb, line in VERBS.items()),
        "",
        "first steps",
        "  moetrain train experiment=debug         a run of seconds",
        "  moetrain train experiment=quickstart    a model that learns bytes in minutes",
        "  moetrain generate run.name=quickstart generate.prompt='def '",
        "",
        "keys to know first (moetrain train --help names the groups and all pages)",
        *first_keys(),
        "",
        "groups: moetrain train --help <group> lists options and keys",
        *wrap(" ".join(f"{group}=" for group in group_options()), 80, initial_indent="  ",
              subsequent_indent="  "),
        "",
        "what the words on the screen mean: docs/reference/output.md",
    ])


if __name__ == "__main__":
    sys.exit(main())
