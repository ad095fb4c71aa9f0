"""moetrain check [--parts] [--json] [key=value ...]: try the promises of the chosen router and losses.

    moetrain check router=sigmoid loss=[z]
    moetrain check run.packages=[my_moe] router=tempered

The router and each loss are called on a few tokens: decisions are well formed, do not depend on other tokens,
and leave no trace of padding; contributions of losses add up; gradients are right. Then a small model trains
for a few steps in float64 in one process, and again in micro-batches, recomputed, and on two ranks: all
numbers have to be the same. --parts leaves the trainings out and takes seconds. The exit code is 1 if a
promise is broken.
"""

import json
import tempfile
from pathlib import Path

from moetrain.check.part import Section, sections
from moetrain.check.training import described
from moetrain.config.compose import compose


def run(argv: list[str]) -> int:
    """Run the verb on the words that follow it; returns the exit code."""
    words = [word for word in argv if word not in ("--json", "--parts")]
    as_json, trains = "--json" in argv, "--parts" not in argv
    config = compose(described(words))
    broken = []
    with tempfile.TemporaryDirectory(prefix="moetrain-check-") as folder:
        for section in sections(config, words, Path(folder) if trains else None):
            broken += _show(section, quiet=as_json)
    if as_json:
        print(json.dumps({"holds": not broken, "broken": broken}, ensure_ascii=False))
    else:
        print(f"\n{len(broken)} broken" if broken else "\nno promise is broken")
    return 1 if broken else 0


def _show(section: Section, *, quiet: bool) -> list[dict[str, str]]:
    """Run the checks of a section and print each; returns the broken ones."""
    if not quiet:
        print(f"\n{section.title}", flush=True)
    broken = []
    for number, found in enumerate(section.findings, 1):
        if found.problem:
            broken.append({"part": section.title, "promise": found.name, "seen": found.problem,
                           "try": found.advice})
        if not quiet:
            state = "BROKEN" if found.problem else "ok    " if found.not_tried is None else "-     "
            reason = f" (not tried: {found.not_tried})" if found.not_tried else ""
            print(f"  {number}/{section.number}  {state}  {found.name}{reason}")
            if found.problem:
                print(f"       seen  {found.problem}\n       try   {found.advice}", flush=True)
    return broken
