"""Timelines of how a step waits for the counts of its balance loss, recorded on real ranks.

    python -m tools.study.balance_trace                         writes docs/results/balance_trace.md and .png
    python -m tools.study.balance_trace --between 100mbit       ranks on emulated links (tools/netlab/lab.py)

Two ranks train a few steps in each mode with log.timeline. In every step the all-reduce of the counts is
found on the thread of gloo that carries it, and beside it on the rank's own thread: where it was posted, what
ran until the rank waited for it, and how long that took. Emulated links need Linux, and root or user
namespaces.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RUN = ["experiment=quickstart", "data=synthetic", "data.vocab_size=257", "model.num_experts=64",
       "model.top_k=8", "model.expert_dim=32", "parallel=ep", "run.nproc=2", "train.micro_batch=2",
       "run.device=cpu", "log.wandb=off", "log.progress=false", "eval.windows=1"]
MODES = {
    "exact, graphs kept": ["balance.mode=exact", "train.count_pass=false"],
    "exact, counted first": ["balance.mode=exact", "train.count_pass=true"],
    "sync": ["balance.mode=sync"], "buffer": ["balance.mode=buffer"], "warm": ["balance.mode=warm"],
    "buffer, attached": ["balance.mode=buffer", "train.aux_loss=injected"],
}
COLORS = {"forward": "#cfd8e6", "count": "#e6dccf", "head": "#4c78a8", "backward": "#d9d9d9",
          "loss": "#54a24b", "counts: post": "#a84300", "counts: wait": "#e45756",
          "gloo:all_reduce": "#f58518", "gloo:all_to_all": "#b8b8b8"}


class Span(NamedTuple):
    """A named range of a timeline, in microseconds."""

    name: str
    begin: float
    end: float


class Pooled(NamedTuple):
    """One all-reduce of counts on one rank.

    Args:
        post: its posting.
        transfer: the all-reduce on the thread of gloo.
        covered: ranges of this rank that ran between posting and waiting.
        wait: the wait.
        next: what the rank did after it waited, or the backward in which it did.
    """

    post: Span
    transfer: Span | None
    covered: list[Span]
    wait: Span
    next: Span | None


def spans(path: Path) -> list[Span]:
    """Named ranges and collectives of a rank's timeline, by their beginning."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
             for event in events if event.get("ph") == "X" and event.get("cat") == "user_annotation"]
    return sorted(found, key=lambda span: span.begin)


def pooled(found: list[Span]) -> list[Pooled]:
    """Find every all-reduce of counts of a step. Each is awaited before the next is posted."""
    posts, waits = ([span for span in found if span.name == name]
                    for name in ("counts: post", "counts: wait"))
    assert len(posts) == len(waits), f"{len(posts)} were posted and {len(waits)} awaited"
    result = []
    for post, wait in zip(posts, waits):
        transfer = next((span for span in found
                         if span.name == "gloo:all_reduce" and span.begin >= post.begin), None)
        covered = [span for span in found if span.name in ("head", "forward", "count")
                   and span.begin >= post.end and span.end <= wait.begin]
        around = (span for span in found if span.name == "backward"
                  and span.begin <= wait.begin and span.end >= wait.end)
        after = (span for span in found if span.name in ("loss", "head", "forward", "backward")
                 and span.begin >= wait.end)
        result.append(Pooled(post, transfer, covered, wait, next(around, None) or next(after, None)))
    return result


def record(words: list[str], folder: Path, steps: int, between: str | None) -> list[list[list[Span]]]:
    """Train with log.timeline, and return the spans of every step that counts, of every rank.

    Args:
        words: overrides.
        folder: the run directory.
        steps: number of steps that count.
        between: rate of emulated links, or None for the loopback of this machine.
    """
    lab = [] if between is None else [
        sys.executable, "-m", "tools.netlab", "--nodes", "2", "--per-node", "1",
        "--inside", between, "--between", between, "--"]
    command = [*lab, sys.executable, "-m", "moetrain", "train", *RUN, *words, f"run.dir={folder}",
               f"run.steps={steps + 2}", f"log.timeline={steps + 1}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    # The profiler starts in the first recorded step.
    recorded = sorted((folder / "log/timeline").iterdir())[1:]
    return [[spans(path) for path in sorted(step.iterdir())] for step in recorded]


def row(mode: str, steps: list[list[list[Span]]]) -> str:
    """Row of the table: medians of a mode over steps and ranks."""
    each = [pooled(rank) for step in steps for rank in step]
    flat = [one for rank in each for one in rank]
    behind = sum(any(span.name == "head" for span in one.covered) for one in flat)
    afterwards = {one.next.name for one in flat if one.next}
    in_flight_us = statistics.median(one.transfer.end - one.post.begin for one in flat if one.transfer)
    covered = statistics.median(one.wait.begin - one.post.end for one in flat)
    waits = sorted(one.wait.end - one.wait.begin for one in flat)
    exposed = statistics.median(after for step in steps for one in zip(*map(pooled, step))
                                for after in after_both(one))
    arrived = sum(one.transfer is not None and one.transfer.end <= one.wait.begin for one in flat)
    return (f"| {mode} | {len(flat) / len(each):g} | {behind} of {len(flat)} "
            f"| {', '.join(sorted(afterwards))} | {in_flight_us:.0f} | {covered:.0f} "
            f"| {arrived / len(flat):.0%} | {statistics.median(waits):.0f} | {exposed:.0f} "
            f"| {waits[-1]:.0f} |")


def after_both(ranks: tuple[Pooled, ...]) -> list[float]:
    """Part of each rank's wait for one sum after the last rank had posted. One machine has one clock."""
    last = max(one.post.end for one in ranks)
    return [max(0.0, one.wait.end - max(one.wait.begin, last)) for one in ranks]


def page(recorded: dict[str, dict[str, list]], steps: int, picture: str, words: str) -> str:
    """The page, as Markdown.

    Args:
        recorded: by links and mode, the spans of every step and rank.
        steps: number of steps that count.
        picture: file name of the picture.
        words: options of the command.
    """
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    import torch

    text = [
        "# Where a step waits for the counts of its balance loss", "",
        f"`python -m tools.study.balance_trace{words}`, commit {commit}; two ranks on one machine, gloo, one "
        f"thread each ({platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}); quickstart "
        f"with 64 experts, four micro-batches per step, {steps} steps per mode, recorded by "
        "`log.timeline`. Times are in microseconds, medians over steps and ranks. Recording makes everything "
        "slower than usual.",
        "",
        "| | |", "|---|---|", "| all-reduces | all-reduces of counts in a step |",
        "| head behind it | for how many of these the head ran between posting and waiting |",
        "| then | what the rank does once it has the counts |",
        "| in flight | from posting until gloo's thread had the sum |",
        "| covered | from posting until the rank waited for it |",
        "| had arrived | how often the sum had arrived when the rank waited |",
        "| waited | time in the wait itself: until the slower rank had posted too, and the sum had arrived "
        "|",
        "| after both | the part of it after the slower rank had posted: the cost of the sum itself |", "",
    ]
    for links, modes in recorded.items():
        text += [f"## {links}", "",
                 "| mode | all-reduces | head behind it | then | in flight | covered | had arrived | waited "
                 "| after both | longest |",
                 "|---|---|---|---|---|---|---|---|---|---|",
                 *(row(mode, found) for mode, found in modes.items()), ""]
    text += [f"![a micro-batch of mode buffer on both ranks]({picture})", "",
             "The all-reduce is posted when the last router has decided, before the tokens of its layer "
             "travel, and no rank waits for it before the loss. In mode `exact` that is the loss of the "
             "first micro-batch; with `train.aux_loss=injected` ranks wait after the head has run "
             "backward. The other rank may therefore be late by a whole layer, or after a count pass by a "
             "whole forward pass, before any rank waits for it. `tests/integration/test_timeline.py` asserts "
             "this order, and finds a wait that is put back before the head.", ""]
    return "\n".join(text)


def draw(ranks: list[list[Span]], title: str, out: Path) -> None:
    """Draw the last micro-batch of a step: for every rank its own thread, and gloo's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    axes, labels = figure.subplots(), {}
    first = min(pooled(rank)[-1].post.begin for rank in ranks) - 1500
    ends = (next(span.begin for span in rank
                 if span.name == "backward" and span.begin > pooled(rank)[-1].wait.end) for rank in ranks)
    last = max(ends) + 1500
    for number, rank in enumerate(ranks):
        # gloo's threads overlap: counts on top.
        for span in sorted(rank, key=lambda span: span.name == "gloo:all_reduce"):
            if span.name not in COLORS or span.end < first or span.begin > last:
                continue
            exchanged = span.name.startswith("gloo")
            outer = exchanged or span.name in ("forward", "count", "backward")
            place = 2 * number + exchanged + (0.0 if outer else 0.1)
            begin, end = max(span.begin, first), min(span.end, last)
            label = "counts in flight" if span.name == "gloo:all_reduce" else span.name
            bar = axes.barh(place, (end - begin) / 1e3, left=(begin - first) / 1e3, color=COLORS[span.name],
                            edgecolor="white", linewidth=0.4, height=0.8 if outer else 0.5)
            labels.setdefault(label, bar)
    axes.set_yticks(range(2 * len(ranks)),
                    [f"rank {number}{of}" for number in range(len(ranks)) for of in ("", ", gloo")])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(labels.values(), labels.keys(), ncols=len(labels), loc="upper center",
                bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps that count, of every mode")
    parser.add_argument("--between", help="also on emulated links of this rate, such as 100mbit")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/balance_trace.md")
    options = parser.parse_args()
    picture = options.out.with_suffix(".png")
    links = {"This machine's loopback": None}
    if options.between:
        links[f"Emulated links of {options.between}"] = options.between
    recorded: dict[str, dict[str, list]] = {}
    for name, between in links.items():
        recorded[name] = {}
        for mode, words in MODES.items():
            with tempfile.TemporaryDirectory() as folder:
                recorded[name][mode] = record(words, Path(folder) / "run", options.steps, between)
            print(row(mode, recorded[name][mode]), flush=True)
    name = list(recorded)[-1]
    draw(recorded[name]["buffer"][-1],
         f"{name}, mode buffer: the last micro-batch of a step, two ranks", picture)
    words = f" --between {options.between}" * bool(options.between)
    options.out.write_text(page(recorded, options.steps, picture.name, words))
    print(f"{options.out} and {picture.name}")


if __name__ == "__main__":
    main()
