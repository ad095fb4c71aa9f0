"""Stages of a check that takes several calls: each has a time limit and is not repeated once it passed.

    results.json     every stage: passed, failed, skipped or interrupted, its time, what it said, its sources
    <stage>.log      what its commands printed
    summary.txt      the table that a call ends with
    <folder>.tar.gz  all of it and the records of runs, without checkpoints: the one file to send

They are written after every stage: a machine that goes away takes only the stage under way with it.
"""

import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

LIMIT_S = 240                              # of a stage
END_S = 10                                 # for a command that is told to stop
PASSED, FAILED, UNFINISHED = 0, 1, 3       # exit codes of a call; 128 + n: signal n ended it
SENT = (".log", ".json", ".jsonl", ".md", ".txt", ".csv", ".npz", ".yaml")
LARGEST_SENT = 4 << 20                     # bytes of a file
SHOWN_LINES = 6
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Lines of a log that say what went wrong: errors of moetrain, pytest's summary, runs of the parity check that
# differ, the end of a traceback.
_MATTERS = re.compile(r"^(E-[A-Z]+-\d|FAILED |ERROR |\[\d+/\d+\].*(DIFFERS|FAILED)|WRONG|"
                      r"[\w.]*(Error|Exception)\b|CUDA error|no )")


class Stage(NamedTuple):
    """Commands that run one after another until one fails.

    Args:
        name: word of the command line and name of the log.
        about: what the stage does, for the table.
        commands: the commands, each as its words.
        usual_s: seconds that the stage usually takes; with less time left it is not begun.
        skipped: returns the reason why the stage cannot run here, or an empty string.
        counts: pattern that the output must contain for the stage to have tested anything.
        on_request: run the stage only when it is named.
        needed: others cannot run without the stage, so it comes first even when it failed before.
        environment: variables set for the commands.
    """

    name: str
    about: str
    commands: Sequence[Sequence[str]]
    usual_s: int
    skipped: Callable[[], str] = str
    counts: str = ""
    on_request: bool = False
    needed: bool = False
    environment: Mapping[str, str] = {}


class Interrupted(Exception):
    """A signal told this program to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


class Check:
    """The stages of one folder of results, and what became of each.

    Args:
        stages: all stages, in order.
        out: folder of results.json, the logs, the summary and the archive.
        again: command that continues the check.
        sources: version of the code under test, kept with every result.
    """

    def __init__(self, stages: Sequence[Stage], out: Path, again: str, sources: str) -> None:
        self.stages, self.out, self.again, self.sources = list(stages), out, again, sources
        self.file = out / "results.json"
        held = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.machine: str = held.get("machine", "")
        self.results: dict[str, dict[str, Any]] = held.get("stages", {})

    def on(self, machine: str) -> None:
        """Name the machine that the following stages run on, and drop results of another one."""
        if self.machine and self.machine != machine:
            print(f"these results are of another machine ({self.machine}): every stage runs again")
            self.results = {}
        self.machine = machine

    def run(self, names: Sequence[str], end: float) -> int:
        """Run the stages that have not passed, or those that are named, until `end` of time.monotonic().

        What failed before is repeated last, so that a stage that takes long to fail keeps no other from its
        turn. Returns the exit code of the call.
        """
        wanted = [stage for stage in self.stages if (stage.name in names if names else not stage.on_request)]
        handlers = {number: signal.signal(number, _interrupt) for number in _INTERRUPTS}
        try:
            last = {stage.name: self.state(stage.name) == "failed" and not stage.needed for stage in wanted}
            for stage in sorted(wanted, key=lambda stage: last[stage.name]):
                if names or self.state(stage.name) != "passed":
                    self.stage(stage, end)
        except Interrupted as interrupted:
            return 128 + interrupted.number
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        states = [self.state(stage.name) for stage in wanted]
        if "failed" in states:
            return FAILED
        return PASSED if set(states) <= {"passed", "skipped"} else UNFINISHED

    def state(self, name: str) -> str:
        """State of a stage: passed, failed, skipped or interrupted; empty before it ran."""
        return self.results.get(name, {}).get("state", "")

    def stage(self, stage: Stage, end: float) -> str:
        """Run one stage, unless it cannot run here or too little time is left, and return its state."""
        left = end - time.monotonic()
        if why := stage.skipped():
            return self.record(stage, "skipped", why)
        if left < stage.usual_s:
            return self.state(stage.name)
        print(f"{stage.name}: {stage.about} ...", flush=True)
        began, log = time.monotonic(), self.out / f"{stage.name}.log"
        self.results.pop(stage.name, None)
        try:
            code = _run_all(stage, log, min(began + LIMIT_S, end))
        except Interrupted as interrupted:
            self.record(stage, "interrupted", f"by {signal.Signals(interrupted.number).name}", began)
            raise
        lines = log.read_text(errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code is None and time.monotonic() - began < LIMIT_S - 1:
            return self.record(stage, "interrupted", "by the end of this call", began)
        if code is None:
            return self.record(stage, "failed", f"not finished after {LIMIT_S} s", began, matters(lines))
        if code:
            return self.record(stage, "failed", f"exit code {code}: {said}", began, matters(lines), code)
        if stage.counts and not re.search(stage.counts, "\n".join(lines)):
            return self.record(stage, "skipped", f"nothing was tested: {said}", began)
        return self.record(stage, "passed", said, began)

    def record(self, stage: Stage, state: str, note: str, began: float | None = None,
               lines: Sequence[str] = (), code: int | None = None) -> str:
        """Keep the result of a stage and return its state.

        Args:
            stage: the stage.
            state: passed, failed, skipped or interrupted.
            note: one line for the table.
            began: time.monotonic() at the start, or None if the stage did not run.
            lines: the lines of its log that matter.
            code: exit code of the command that failed.
        """
        seconds = round(time.monotonic() - began, 1) if began else 0.0
        self.results[stage.name] = {
            "state": state, "note": note, "seconds": seconds, "exit": code, "lines": list(lines),
            "sources": self.sources,
            "commands": [" ".join(command) for command in stage.commands]}
        after = f"  {state} after {seconds:.0f} s: {note}"
        print(after if began else f"{stage.name}: {state}: {note}", flush=True)
        self.write()
        return state

    def write(self) -> None:
        """Replace results, summary and archive, each atomically."""
        results = {"machine": self.machine, "sources": self.sources, "stages": self.results}
        _replace(self.file, json.dumps(results, indent=1) + "\n")
        _replace(self.out / "summary.txt", self.summary() + "\n")
        unfinished = self.archive.with_suffix(".part")
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in sorted(path for path in self.out.rglob("*") if path.suffix in SENT):
                if not path.is_file():
                    continue
                if path.stat().st_size <= LARGEST_SENT:
                    archive.add(path, f"{self.out.name}/{path.relative_to(self.out)}")
        unfinished.rename(self.archive)

    @property
    def archive(self) -> Path:
        return self.out / f"{self.out.name}.tar.gz"

    def listing(self) -> str:
        """Lines with the name of every stage, its state and what it does."""
        width = max(len(stage.name) for stage in self.stages)
        states = {stage.name: self.state(stage.name)
                  or ("only when named" if stage.on_request else "not run yet") for stage in self.stages}
        return "\n".join(f"{stage.name:{width}}  {states[stage.name]:15}  {stage.about}"
                         for stage in self.stages)

    def summary(self) -> str:
        """Table of the stages, the lines that matter of those that failed, and the command to continue."""
        shown = [stage for stage in self.stages if stage.name in self.results or not stage.on_request]
        width = max(len(stage.name) for stage in shown)
        rows = []
        for stage in shown:
            result = self.results.get(stage.name)
            said = "not run yet"
            if result:
                said = f"{result['state']:11}  {result['seconds']:5.0f} s  {result['note'][:100]}"
            rows.append(f"{stage.name:{width}}  {said}")
        for stage in shown:
            if self.state(stage.name) == "failed":
                result = self.results[stage.name]
                rows += ["", f"{stage.name}: {result['note']}; all of it is in {self.out / stage.name}.log"]
                rows += [f"    {line[:160]}" for line in result["lines"]]
        left = [stage.name for stage in shown if self.state(stage.name) not in ("passed", "skipped")]
        failed = any(self.state(name) == "failed" for name in left)
        rows += ["", f"on {self.machine or 'no GPU'}, moetrain {self.sources}"]
        if left:
            repeated = " (failed ones are repeated)" * failed
            rows.append(f"to go on with {len(left)} of {len(shown)} stages{repeated}:  {self.again}")
        return "\n".join([*rows, f"to send: {self.archive}"])


def matters(lines: Sequence[str]) -> list[str]:
    """The last lines of a log that say what went wrong; without any, its last lines."""
    kept = [line for line in lines if line.strip()]
    return ([line for line in kept if _MATTERS.match(line)] or kept)[-SHOWN_LINES:]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _run_all(stage: Stage, log: Path, end: float) -> int | None:
    """First exit code of a stage that is not 0, or None when its time is over."""
    with log.open("w") as output:
        for command in stage.commands:
            print("$", " ".join(command), file=output, flush=True)
            code = _run(command, output, {**os.environ, **stage.environment}, end - time.monotonic())
            if code != 0:
                return code
    return 0


def _run(command: Sequence[str], output: Any, environment: Mapping[str, str], limit_s: float) -> int | None:
    """Exit code of a command, or None when it was stopped with its children because its time was over."""
    # A signal that raised before `try` would leave the process behind, so it is only noted until then.
    arrived: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: arrived.append(number))
                for number in _INTERRUPTS}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                               env=environment, start_new_session=True)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            raise Interrupted(arrived[0])
        return process.wait(max(limit_s, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)       # runs save, and tell their ranks
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            for member in _session(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            process.wait()


def _session(leader: int) -> list[int]:
    """Processes of a session. The ranks of a run have process groups of their own in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.rename(path)
