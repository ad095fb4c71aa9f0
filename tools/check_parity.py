"""The same training however it is run: ranks, wires and kernels against one process on the CPU in float64.

    python tools/check_parity.py --out build/parity                     two ranks on the CPU
    python tools/check_parity.py --out build/parity --device cuda       one GPU: without kernels and with them, alone and shared by four ranks
    ... --only peer         arms whose name contains this

Every arm is `moetrain train` of a tiny model on synthetic tokens, with uneven padding, balance and z losses, two micro-batches a step, clipping and AdamW,
20 steps. Compared are all steps of metrics.jsonl (cross-entropy, balance, gradient norm) and the counts of all experts in loads.npz:

    float64     numbers to 1e-9, counts exactly
    float32     the loss curve within 1e-3 of itself       bfloat16     within 2e-2

With --device cuda and kernels (MOETRAIN_KERNELS=1 is set for those arms alone) tools/build_cuda.py must have run. Arms of several ranks share
the GPU (run.share_gpu): rows travel through symmetric memory with `peer` and `peer_push`, all else over gloo. Exit code 1 when an arm
differs or does not run; what has been compared is in <out>/parity.json, and finished runs are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

COMMON = (
    "data=synthetic", "data.vocab_size=48", "data.min_length=0.4", "train.seq_len=32", "train.global_batch=16", "train.micro_batch=2",
    "model.dim=32", "model.num_layers=2", "model.expert_dim=32", "model.num_experts=8", "model.num_shared_experts=1",
    "model.init_std=0.2", "balance.weight=0.1", "loss=[z]", "loss.z.weight=0.01", "train.clip=0.5", "optim.lr=1e-2", "optim.warmup=2",
    "run.steps=20", "run.timeout_s=120", "run.max_restarts=0", "log.wandb=off",
)
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 2e-2}
NUMBERS = {"float64": ("loss/ce", "loss/balance", "grad_norm"), "float32": ("loss/ce",), "bfloat16": ("loss/ce",)}
WAYS = {                                                 # of several ranks
    "flat": ["parallel=ep"],
    "peer": ["parallel=ep", "parallel.exchange=peer"],
    "peer_push": ["parallel=ep", "parallel.exchange=peer_push"],
    "peer_push in chunks": ["parallel=ep", "parallel.exchange=peer_push", "schedule=fixed", "schedule.chunks=2"],
    "sharded": ["parallel=ep_fsdp"],
    "fssdp over peer": ["parallel=fssdp", "parallel.exchange=peer"],
}
LIMIT_S = 240                                            # of an arm


class Arm(NamedTuple):
    name: str
    dtype: str
    overrides: list[str]
    kernels: bool = False


REFERENCE = Arm("reference", "float64", ["run.device=cpu", "parallel=single", "train.micro_batch=16"])


def main() -> int:
    args = parse()
    arms = [arm for arm in (gpu_arms(args.ranks) if args.device == "cuda" else cpu_arms(args.ranks)) if args.only in arm.name]
    args.out.mkdir(parents=True, exist_ok=True)
    problem = train(REFERENCE, args.out)
    if problem:
        print(f"the reference does not run: {problem}", file=sys.stderr)
        return 1
    found = {}
    for number, arm in enumerate(arms, 1):
        print(f"[{number}/{len(arms)}] {arm.name:34}", end=" ", flush=True)
        problem = train(arm, args.out)
        found[arm.name] = {"failed": problem} if problem else compare(args.out, arm)
        print(shown(found[arm.name]), flush=True)
        (args.out / "parity.json").write_text(json.dumps(found, indent=1) + "\n")
    wrong = [name for name, result in found.items() if not result.get("equal")]
    print(f"{len(arms) - len(wrong)} of {len(arms)} arms are the reference" + "".join(f"\n  not {name}" for name in wrong))
    return 1 if wrong or not arms else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of parity.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), help="of arms with several (cpu: 2, cuda: 4)")
    parser.add_argument("--only", default="", help="arms whose name contains this")
    args = parser.parse_args()
    args.ranks = args.ranks or (4 if args.device == "cuda" else 2)
    return args


def cpu_arms(ranks: int) -> list[Arm]:
    alone = [Arm(f"alone, {dtype}", dtype, ["run.device=cpu"]) for dtype in TOLERANCE]
    return [*alone, *(Arm(f"{ranks} ranks, {way}", "float64", ["run.device=cpu", f"run.nproc={ranks}", *overrides])
                      for way, overrides in WAYS.items())]


def gpu_arms(ranks: int) -> list[Arm]:
    """Each without kernels and with them."""
    arms = [Arm(f"alone, {dtype}", dtype, ["run.device=cuda"]) for dtype in TOLERANCE]
    shared = ["run.device=cuda", "run.share_gpu=true", f"run.nproc={ranks}"]
    arms += [Arm(f"{ranks} ranks, {way}", "float64", [*shared, *overrides]) for way, overrides in WAYS.items()]
    arms += [Arm(f"{ranks} ranks, peer_push, bfloat16", "bfloat16", [*shared, *WAYS["peer_push"]])]
    return [version for arm in arms for version in (arm, arm._replace(name=f"{arm.name}, kernels", kernels=True))]


def train(arm: Arm, out: Path) -> str | None:
    """What went wrong. A run that is finished is not run again; one that was stopped is begun anew."""
    directory = folder(out, arm)
    command = [sys.executable, "-m", "moetrain", "train", *COMMON, *arm.overrides, f"run.dtype={arm.dtype}", f"run.dir={directory}"]
    environment = {key: value for key, value in os.environ.items() if key != "MOETRAIN_KERNELS"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"MOETRAIN_KERNELS": "1"} if arm.kernels else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"not finished after {LIMIT_S} s, {directory}/log"
    return None if done.returncode == 0 else f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[0]}"


def compare(out: Path, arm: Arm) -> dict:
    """Largest relative difference of any number of any step; in float64, whether counts are the same."""
    truth, ours = numbers(folder(out, REFERENCE), arm.dtype), numbers(folder(out, arm), arm.dtype)
    if truth.shape != ours.shape:
        return {"failed": f"{len(ours)} steps, the reference has {len(truth)}"}
    difference = float(np.max(np.abs(ours - truth) / np.abs(truth)))
    counts = [np.load(folder(out, of) / "loads.npz")["loads"] for of in (REFERENCE, arm)]
    same = arm.dtype != "float64" or np.array_equal(*counts)
    return {"difference": difference, "tolerance": TOLERANCE[arm.dtype], "equal": same and difference <= TOLERANCE[arm.dtype],
            "counts": "the same" if np.array_equal(*counts) else "others"}


def numbers(directory: Path, dtype: str) -> np.ndarray:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in NUMBERS[dtype]] for line in lines])


def folder(out: Path, arm: Arm) -> Path:
    return (out / arm.name.replace(", ", "-").replace(" ", "_")).resolve()


def shown(result: dict) -> str:
    if "failed" in result:
        return f"FAILED  {result['failed']}"
    return f"{'equal' if result['equal'] else 'DIFFERS':8}{result['difference']:.1e} (at most {result['tolerance']:.0e}), counts {result['counts']}"


if __name__ == "__main__":
    sys.exit(main())
