"""Study of what balancing over the global batch buys: many small runs, restartable, one table and pictures.

    python -m tools.study.balance --stage 1                # all arms at three weights, two seeds, short
    python -m tools.study.balance --stage 2                # the chosen arms, at equal balance, five seeds
    python -m tools.study.balance --report                 # docs/results/balance.md from what has finished
    python -m tools.study.balance --size gpu --stage 1     # a larger model on a GPU; results/balance_gpu.*

A model of 4 layers of 32 experts, top-4, width 128, on the built-in corpus (five domains, each alike),
trained by two ranks in turns of micro-batches of two sequences: a global batch of 32 sequences is eight
micro-batches of each rank. So a balance loss sees 2 sequences (micro), 4 (sync), 4 to 32 (buffer), about 32
(warm) or 32 (exact). Runs of a seed have equal initial weights and equal batches in equal order: arms are
compared in pairs.

On a GPU: 8 layers of 64 fine-grained experts, top-8, width 256, one rank in 32 turns of two sequences.
Without other ranks, sync is micro, and left out.

Biases move by a step against the load (micro or global counts), or by a share of the way to the quantile
that gives every expert its share of the global batch (routers/quantile.py).

The second stage takes each arm at the weight where the first stage gives it the global max violation of the
target: the tightest balance that every arm reached. Weights are interpolated in the logarithms of both.
(Before stage 2 began, the target was looser, 1.2 where it is 0.5 now: there, stage 1 found arms alike, so
that equal balance would have told nothing of them.)

Every run is `moetrain train` with its own directory under --out, which resumes by itself: a study that was
stopped goes on with the same command. What has finished is also in docs/results/balance_runs.jsonl, so that
it goes on on another machine, where the corpus must be the same (the built-in one is made of installed
packages). Runs take both cores; `nice` does not change what comes out.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tools.study.balance_report import Arm, Trained, interpolated, read, write_page
from tools.study.runner import ROOT, Planned, commit, read_records, train_all

ARMS = {
    "micro": Arm("balance.weight", (1e-3, 1e-2, 1e-1), ("balance=micro",)),
    "sync": Arm("balance.weight", (1e-3, 1e-2, 1e-1), ("balance=global", "balance.mode=sync")),
    "buffer": Arm("balance.weight", (1e-3, 1e-2, 1e-1), ("balance=global", "balance.mode=buffer")),
    "warm": Arm("balance.weight", (1e-3, 1e-2, 1e-1), ("balance=global", "balance.mode=warm")),
    "exact": Arm("balance.weight", (1e-3, 1e-2, 1e-1), ("balance=global", "balance.mode=exact")),
    "bias, micro counts": Arm("router.update_rate", (1e-3, 3e-3, 1e-2),
                              ("router=sigmoid", "balance=none", "router.counts=micro")),
    "bias, global counts": Arm("router.update_rate", (1e-3, 3e-3, 1e-2),
                               ("router=sigmoid", "balance=none", "router.counts=global")),
    "bias, quantiles": Arm("router.quantile_rate", (3e-2, 3e-1, 1.0),
                           ("router=sigmoid", "balance=none", "router.balance=quantile")),
}
FINAL = ("micro", "exact", "warm", "bias, global counts", "bias, quantiles")
STAGES = {1: (200, (1, 2)), 2: (800, (11, 12, 13, 14, 15))}       # optimizer steps, seeds
COMMON = ("experiment=quickstart", "train.micro_batch=2", "eval.windows=128", "eval.interval=0",
          "log.wandb=off", "log.interval=50", "checkpoint.interval=100")


class Size(NamedTuple):
    """Size of a study.

    Args:
        words: overrides of every run.
        where: the machine, for the page.
        arms: names of the arms.
        results: path of page and records, without suffix.
    """

    words: tuple[str, ...]
    where: str
    arms: tuple[str, ...]
    results: Path

    @property
    def record(self) -> Path:
        return self.results.with_name(f"{self.results.name}_runs.jsonl")


SIZES = {
    "cpu": Size(("run.device=cpu", "parallel=ddp", "run.nproc=2", "model.num_layers=4",
                 "model.num_experts=32", "model.top_k=4", "model.expert_dim=32", "train.global_batch=32",
                 "train.seq_len=128"),
                "Two ranks on two CPU cores, gloo", tuple(ARMS), ROOT / "docs/results/balance"),
    "gpu": Size(("run.device=cuda", "run.dtype=bfloat16", "parallel=single", "run.nproc=1", "model.dim=256",
                 "model.num_layers=8", "model.num_experts=64", "model.top_k=8", "model.expert_dim=64",
                 "train.global_batch=64", "train.seq_len=256"),
                "One GPU, bfloat16", tuple(arm for arm in ARMS if arm != "sync"),
                ROOT / "docs/results/balance_gpu"),
}


class Job(NamedTuple):
    """One run of the study."""

    stage: int
    arm: str
    strength: float              # weight of the loss, or what the bias moves
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.arm.replace(', ', '_').replace(' ', '_')}-{self.strength:.3g}-{self.seed}"

    def command(self, out: Path, size: Size) -> list[str]:
        arm, steps = ARMS[self.arm], STAGES[self.stage][0]
        return [sys.executable, "-m", "moetrain", "train", *COMMON, *size.words, *arm.overrides,
                f"{arm.key}={self.strength:.4g}", f"run.steps={steps}", f"run.seed={self.seed}",
                f"run.name={self.name}", f"run.dir={out / self.name}", f"data.cache={out / 'data'}"]


def main() -> None:
    options = parse()
    size = SIZES[options.size]
    out = Path(options.out or f"runs/study_{size.results.name}").resolve()
    finished = read_all(out, size.record)
    if not options.report:
        run(jobs(options, finished), out, size, options.minutes)
        finished = read_all(out, size.record)
    size.record.write_text("".join(json.dumps(run._asdict()) + "\n" for run in finished))
    arms = {arm: ARMS[arm] for arm in size.arms}
    page = write_page(finished, arms, FINAL, STAGES, size.where, size.results.with_suffix(".md"))
    print(f"{len(finished)} runs have finished; {page}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--stage", type=int, choices=STAGES, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these")
    parser.add_argument("--out", help="where the runs are (runs/study_balance; "
                                      "with --size gpu runs/study_balance_gpu)")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="start no further run after so many minutes")
    parser.add_argument("--report", action="store_true",
                        help="train nothing; write the page from what has finished")
    return parser.parse_args()


def jobs(options: argparse.Namespace, finished: list[Trained]) -> list[Job]:
    """Runs of a stage, by seed and strength; the middle strength first, so that a few compare all arms."""
    arms = options.arms or (SIZES[options.size].arms if options.stage == 1 else FINAL)
    if options.stage == 1:
        return [Job(1, arm, ARMS[arm].strengths[place], seed)
                for seed in STAGES[1][1] for place in (1, 2, 0) for arm in arms]
    strength = interpolated(finished, ARMS)
    missing = [arm for arm in arms if arm not in strength]
    if missing:
        raise SystemExit(f"stage 2 needs the runs of stage 1 of {', '.join(missing)}")
    return [Job(2, arm, float(f"{strength[arm]:.4g}"), seed) for seed in STAGES[2][1] for arm in arms]


def run(planned: list[Job], out: Path, size: Size, minutes: float) -> None:
    """Train what has not finished, one run after the other.

    Args:
        planned: the runs.
        out: folder of the runs.
        size: size of the study.
        minutes: no run is started after so many.
    """
    finished, made_by = {run[:4] for run in read_all(out, size.record)}, commit()
    left = [Planned(job.name, job.command(out, size), partial(read, job=job._asdict(), commit=made_by), shown)
            for job in planned if job not in finished]
    print(f"{len(planned) - len(left)} of {len(planned)} runs have finished; {len(left)} to go")
    train_all(left, out, minutes)


def shown(result: Trained) -> str:
    """Figures of a run in a line."""
    return (f"loss {result.losses['mean']:.4f}, violation {result.violation:.2f} global "
            f"{result.local_violation:.2f} local")


def read_all(out: Path, record: Path) -> list[Trained]:
    """Finished runs of this machine and of the record."""
    runs = [Trained(**values) for values in read_records(out, record)]
    return sorted({run[:4]: run for run in runs}.values(), key=lambda run: run[:4])


if __name__ == "__main__":
    main()
