"""Study of routers and layer architectures: every one at equal parameters, paired by seed; one table.

    python -m tools.study.routers                      # all arms, three seeds, 300 steps
    python -m tools.study.routers --arms topk relu     # only these; `topk` is what others are compared with
    python -m tools.study.routers --report             # docs/results/routers.md from what has finished

A byte-level model of 4 layers, width 128, with 8 experts of width 128, of which a token takes 2, on the
built-in corpus (five domains, each alike); 16 sequences of 256 bytes a step, AdamW at 1e-3, 50 steps of
warmup. Runs of a seed have equal initial weights where the tensors are the same, and equal batches in equal
order: arms are compared with `topk` in pairs.

Every arm has as many parameters in its experts as `topk`, and a token uses as many of them, as far as the
scheme allows: where the number of experts of a token varies, its target is 2, or the table shows the mean.
So Chain-of-Experts goes twice through the experts and takes one each time, residual MoE has 7 experts of
which a token takes one, beside a dense network of the width of one, and fine-grained experts are 32 of width
32, of which a token takes 8. Every arm has the balance loss of the global batch at weight 0.01, but those
that balance by other means or not at all.

Losses are held-out nats per byte. Step times are relative to `topk` of the same seed; runs take turns, so a
machine that becomes slower slows all arms. Every run resumes by itself.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from moetrain.comm.mesh import build_mesh
from moetrain.config.compose import compose
from moetrain.config.sizes import ids_of
from moetrain.model.build import meta_model
from tools.study.routers_report import Trained, read, write_page
from tools.study.runner import ROOT, Planned, commit, read_records, train_all

# Overrides of each arm. The first is what the others are compared with.
ARMS: dict[str, tuple[str, ...]] = {
    "topk": (),
    "topk, raw weights": ("router.weights=raw",),
    "topk, one wide expert": ("model.num_experts=4", "model.expert_dim=256", "model.top_k=1",
                              "router.weights=raw", "router.jitter_eps=0.01"),
    "topk, GShard": ("router.second_expert=random", "balance=none", "loss=[first_choice]"),
    "topk, importance and load": ("router.noise=normal", "balance=none", "loss=[importance,load]"),
    "topk, quantile biases": ("balance=none", "router.balance=quantile"),
    "sigmoid, biases": ("router=sigmoid", "balance=none", "router.update_rate=0.01"),
    "sigmoid, quantile biases": ("router=sigmoid", "balance=none", "router.balance=quantile"),
    "cosine": ("router=cosine",),
    "sparsemixer": ("router=sparsemixer",),
    "top_p": ("router=top_p", "loss=[entropy]", "loss.entropy.weight=1e-2"),
    "dtop_p": ("router=dtop_p", "router.target_k=2"),
    "null_expert": ("router=null_expert", "model.top_k=4", "balance=none", "loss=[null_lbl]",
                    "loss.null_lbl.weight=1e-2"),
    "relu": ("router=relu", "balance=none", "loss=[l1_lb]"),
    "recurrent": ("router=recurrent",),
    "mlp, mutual information": ("router=mlp", "balance=none", "loss=[mutual_information]"),
    "hierarchical": ("router=hierarchical",),
    "cluster, random points": ("router=cluster", "balance=none"),
    "expert_choice": ("router=expert_choice", "balance=none", "eval.allow_noncausal=true"),
    "fixed_random": ("router=fixed_random", "balance=none"),
    "hash": ("router=hash", "model.num_experts=4", "model.expert_dim=256", "model.top_k=1", "balance=none"),
    "stochastic": ("router=stochastic", "balance=none"),
    "domain, all experts": ("router=domain",),
    "fine-grained": ("model.num_experts=32", "model.expert_dim=32", "model.top_k=8"),
    "fine-grained, shared": ("model.num_experts=28", "model.expert_dim=32", "model.top_k=4",
                             "model.num_shared_experts=4"),
    "residual": ("model.block=residual", "model.num_experts=7", "model.top_k=1", "router.weights=raw"),
    "pyramid": ("model.num_experts=[4,4,12,12]",),
    "chain": ("model.block=chain", "model.top_k=1", "router.weights=raw"),
    "latent": ("model.block=latent", "model.latent_dim=64", "model.expert_dim=256"),
    "sliced": ("model.block=sliced",),
}
COMMON = ("experiment=quickstart", "parallel=single", "run.nproc=1", "run.device=cpu", "model.dim=128",
          "model.num_layers=4", "model.num_experts=8", "model.expert_dim=128", "model.top_k=2",
          "train.seq_len=256", "train.global_batch=16", "train.micro_batch=4", "optim=adamw", "optim.lr=1e-3",
          "optim.warmup=50", "eval.windows=64", "eval.interval=0", "log.wandb=off", "log.interval=50",
          "checkpoint.interval=100")
# Of arms that do not choose a balance loss.
BALANCE = ("balance=global", "balance.weight=1e-2")
RESULTS = ROOT / "docs/results/routers"


class Job(NamedTuple):
    """One run of the study."""

    arm: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(', ', '_').replace(' ', '_')}-{self.seed}"

    def overrides(self, words: tuple[str, ...]) -> list[str]:
        """Overrides of the run.

        Args:
            words: of every run, after those of the study.
        """
        own = ARMS[self.arm]
        balance = () if any(word.startswith("balance=") for word in own) else BALANCE
        return [*COMMON, *balance, *own, *words, f"run.steps={self.steps}", f"run.seed={self.seed}"]

    def command(self, out: Path, words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "moetrain", "train", *self.overrides(words), f"run.name={self.name}",
                f"run.dir={out / self.name}", f"data.cache={out / 'data'}"]

    def parameters(self, words: tuple[str, ...]) -> tuple[int, int]:
        """Count the parameters of the model, and those of its banks of experts."""
        config = compose(self.overrides(words))
        model = meta_model(config, ids_of(config), build_mesh({}, torch.device("cpu")))
        return _numbers(model), sum(_numbers(bank) for bank in model.banks.values())


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    options = parse()
    out, words = Path(options.out).resolve(), tuple(options.words)
    planned = [Job(arm, seed, options.steps) for seed in range(1, options.seeds + 1)
               for arm in options.arms or ARMS]
    record = options.page.with_name(f"{options.page.stem}_runs.jsonl")
    if not options.report:
        run(planned, out, record, words, options.minutes)
    finished = finished_runs(out, record)
    record.write_text("".join(json.dumps(run._asdict()) + "\n" for run in finished))
    write_page(finished, list(ARMS), options.page)
    print(f"{len(finished)} runs have finished; {options.page}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM",
                        help=f"only these of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    parser.add_argument("--out", default="runs/study_routers", help="folder of the runs")
    parser.add_argument("--page", type=Path, default=RESULTS.with_suffix(".md"), help="the page of results")
    parser.add_argument("--words", nargs="*", default=[], help="further overrides of every run")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="start no further run after so many minutes")
    parser.add_argument("--report", action="store_true",
                        help="train nothing; write the page from what has finished")
    return parser.parse_args()


def run(planned: list[Job], out: Path, record: Path, words: tuple[str, ...], minutes: float) -> None:
    """Train what has not finished, one run after the other.

    Args:
        planned: the runs.
        out: folder of the runs.
        record: file of the runs that have finished.
        words: overrides of every run.
        minutes: no run is started after so many.
    """
    finished = {(run.arm, run.seed, run.steps) for run in finished_runs(out, record)}
    made_by = commit()
    left = [Planned(job.name, job.command(out, words),
                    partial(read, job=job._asdict(), parameters=job.parameters(words), commit=made_by), shown)
            for job in planned if job not in finished]
    print(f"{len(planned) - len(left)} of {len(planned)} runs have finished; {len(left)} to go")
    train_all(left, out, minutes)


def shown(result: Trained) -> str:
    """Figures of a run in a line."""
    return f"loss {result.loss:.4f}, {result.active:.2f} experts a token, {1e3 * result.step_s:.0f} ms"


def finished_runs(out: Path, record: Path) -> list[Trained]:
    """Finished runs of this machine and of the record, by seed and arm."""
    runs = [Trained(**values) for values in read_records(out, record)]
    order = list(ARMS)
    latest = {(run.seed, order.index(run.arm)): run for run in runs if run.arm in ARMS}
    return [latest[key] for key in sorted(latest)]


if __name__ == "__main__":
    main()
