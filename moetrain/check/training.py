"""Comparison of trainings: a way to spread a training, beside one process on the CPU in float64.

Every arm is `moetrain train` of a tiny model on synthetic tokens, with uneven padding, balance and z losses,
micro-batches, clipping and AdamW. Overrides change that model, or with `experiment=` take its place; the
reference gets those that say what is trained and none of those that say how it is spread.

Compared are metrics.jsonl (cross-entropy, balance, gradient norm) and the counts of all experts in loads.npz,
as relative differences:

    float64     all numbers of all steps to 1e-9, counts exactly
    float32     all numbers of the first two steps to 1e-4, the loss of all to 1e-3
    bfloat16    all numbers of the first two steps and the loss of all to 2e-2: this sees gross errors alone
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.config.compose import compose
from moetrain.launch.local import program_environment

COMMON = (
    "data=synthetic", "data.vocab_size=48", "data.min_length=0.4",
    "train.seq_len=32", "train.global_batch=16", "train.micro_batch=2", "train.clip=0.5",
    "model.dim=32", "model.num_layers=2", "model.expert_dim=32", "model.num_experts=8",
    "model.num_shared_experts=1", "model.init_std=0.2",
    "balance.weight=0.1", "loss=[z]", "loss.z.weight=0.01",
    "optim=adamw", "optim.lr=1e-2", "optim.warmup=2", "run.steps=20",
)
EVERY_RUN = ("run.timeout_s=120", "run.max_restarts=0", "log.wandb=off")
# How the reference is spread.
ALONE = ("run.device=cpu", "run.nproc=1", "parallel=single", "schedule=none", "engine=torch")
# Overrides that say how a training is spread and computed: the reference has its own.
HOW = ("parallel", "planner", "hardware", "schedule", "engine",
       "run.device", "run.nproc", "run.share_gpu", "run.dtype", "run.dir", "run.name",
       "train.micro_batch", "train.count_pass", "train.activation_checkpointing", "train.aux_loss",
       "train.head_chunk")
NUMBERS = ("loss/ce", "loss/balance", "grad_norm")
# Largest relative difference: of all numbers of the first steps, and of the loss curve.
TOLERANCE = {"float64": (1e-9, 1e-9), "float32": (1e-4, 1e-3), "bfloat16": (2e-2, 2e-2)}
FIRST = {"float64": None, "float32": 2, "bfloat16": 2}   # steps of which all numbers are compared; None: all
LIMIT_S = 240                                            # of an arm
REFERENCE = "reference"


class Arm(NamedTuple):
    """One training that is compared with the reference.

    Args:
        name: name in the output and of the run's folder.
        dtype: its run.dtype.
        overrides: all overrides except those of dtype and folder.
        kernels: whether it trains with kernels.
    """

    name: str
    dtype: str
    overrides: list[str]
    kernels: bool = False


def reference(overrides: list[str]) -> Arm:
    """One process that trains what the overrides describe, in float64 and on whole batches."""
    kept = [*described(override for override in overrides if not is_how(override)), *ALONE]
    return Arm(REFERENCE, "float64", [*kept, f"train.micro_batch={compose(kept).train.global_batch}"])


def described(overrides: Iterable[str]) -> list[str]:
    """Overrides of the tiny model with these changes, or of an experiment that takes its place."""
    overrides = list(overrides)
    typed = {key_of(override) for override in overrides}
    base: tuple[str, ...] = () if "experiment" in typed else COMMON
    if "loss" in typed:                                  # other losses do not have the keys of z
        base = tuple(override for override in base if key_of(override).partition(".")[0] != "loss")
    return [*base, *EVERY_RUN, *overrides]


def is_how(override: str) -> bool:
    """Whether an override says how a training is spread rather than what is trained."""
    return any(key_of(override) == key or key_of(override).startswith(f"{key}.") for key in HOW)


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def given_arm(overrides: list[str], device: str) -> Arm:
    """Arm of the training that the overrides describe, in float64 unless they name a dtype."""
    typed = {key_of(override) for override in overrides}
    given = [override for override in overrides if key_of(override) not in ("run.dir", "run.name")]
    dtype = compose(described(given)).run.dtype if "run.dtype" in typed else "float64"
    device_override = [] if "run.device" in typed else [f"run.device={device}"]
    return Arm("given", dtype, [*described(given), *device_override])


def train(arm: Arm, out: Path) -> str | None:
    """Train an arm, and return what went wrong or None."""
    directory = folder(out, arm.name)
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-m", "moetrain", "train", *arm.overrides, f"run.dtype={arm.dtype}",
               f"run.dir={directory}"]
    environment = program_environment() | {"OMP_NUM_THREADS": "1"}
    environment.pop("MOETRAIN_KERNELS", None)
    if arm.kernels:
        environment["MOETRAIN_KERNELS"] = "1"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"not finished after {LIMIT_S} s, {directory}/log"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return f"exit {done.returncode}: {next((line for line in lines if line.startswith('E-')), lines[-1])}"
    return astray(arm, json.loads((directory / "env.json").read_text()))


def astray(arm: Arm, environment: dict) -> str | None:
    """How a run differs from its arm: another device, or kernels not as asked. None if it does not."""
    device = "cuda" if "run.device=cuda" in arm.overrides else "cpu"
    if not environment["device"].startswith(device):
        return f"ran on {environment['device']}, not {device}"
    used = environment["kernels"] == "in use"
    if used == arm.kernels:
        return None
    return f"kernels were {'' if used else 'not '}in use: {environment['kernels']}"


def compare(out: Path, arm: Arm) -> dict:
    """Largest relative differences of an arm in all numbers of the first steps and in all losses."""
    truth, ours = numbers(folder(out, REFERENCE)), numbers(folder(out, arm.name))
    if truth.shape != ours.shape:
        return {"failed": f"{len(ours)} steps, the reference has {len(truth)}"}
    smallest = np.finfo(np.float64).tiny                 # a loss may be exactly 0
    differences = np.abs(ours - truth) / np.maximum(np.abs(truth), smallest)
    first, curve = float(differences[:FIRST[arm.dtype]].max()), float(differences[:, 0].max())
    counts = [np.load(folder(out, of) / "loads.npz")["loads"] for of in (REFERENCE, arm.name)]
    same = np.array_equal(*counts)
    within = first <= TOLERANCE[arm.dtype][0] and curve <= TOLERANCE[arm.dtype][1]
    return {"first": first, "curve": curve, "tolerance": TOLERANCE[arm.dtype],
            "counts": "the same" if same else "others", "equal": within and (same or arm.dtype != "float64")}


def numbers(directory: Path) -> np.ndarray:
    """Numbers of a run's metrics.jsonl, float64 [steps, NUMBERS], the loss first."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in NUMBERS] for line in lines])


def folder(out: Path, name: str) -> Path:
    return (out / name.replace(", ", "-").replace(" ", "_")).resolve()


def shown(result: dict) -> str:
    if "failed" in result:
        return f"FAILED  {result['failed']}"
    first, curve = result["tolerance"]
    return (f"{'equal' if result['equal'] else 'DIFFERS':8}"
            f"first steps {result['first']:.1e} (at most {first:.0e}), "
            f"losses {result['curve']:.1e} ({curve:.0e}), counts {result['counts']}")
