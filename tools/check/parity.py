"""Compare training on any mesh, exchange backend or kernels with one process on the CPU in float64.

    python -m tools.check.parity --out build/parity                     two ranks on the CPU
    python -m tools.check.parity --out build/parity --device cuda       one GPU, alone and shared by four
                                                                        ranks, without kernels and with them
    ... --only peer         arms whose name contains this
    python -m tools.check.parity --out build/parity router=sigmoid parallel=ep run.nproc=2
                            the training that these overrides of `moetrain train` describe, and no other

Every arm is `moetrain train` of a tiny model on synthetic tokens, with uneven padding, balance and z losses,
micro-batches, clipping and AdamW, 20 steps, trained anew at every call. Overrides change that model, or with
`experiment=` take its place; the reference gets those that say what is trained and none of those that say how
it is spread. Without `run.dtype` they are tried in float64. What depends on the split by choice
(`balance=micro` and the like) differs, and is reported so.

Compared are metrics.jsonl (cross-entropy, balance, gradient norm) and the counts of all experts in loads.npz,
as relative differences:

    float64     all numbers of all steps to 1e-9, counts exactly
    float32     all numbers of the first two steps to 1e-4, the loss of all to 1e-3
    bfloat16    all numbers of the first two steps and the loss of all to 2e-2: this sees gross errors alone

With --device cuda and kernels (MOETRAIN_KERNELS=1 is set for those arms alone) tools/build_cuda.py must have
run; an arm whose env.json names another device, or kernels that were not as asked, has failed. (Routers have
a kernel for float32 alone, which the float32 and bfloat16 arms reach.) Arms of several ranks share the GPU
(run.share_gpu): rows travel through symmetric memory with `peer` and `peer_push`, all else over gloo. Exit
code 1 when an arm differs or does not run; the results are in <out>/parity.json.
"""

import argparse
import json
import sys
from pathlib import Path

from moetrain.check.training import TOLERANCE, Arm, compare, described, given_arm, reference, shown, train
from moetrain.errors import ConfigErrors

WAYS = {                                                 # of several ranks
    "flat": ["parallel=ep"],
    "peer": ["parallel=ep", "parallel.exchange=peer"],
    "peer_push": ["parallel=ep", "parallel.exchange=peer_push"],
    "peer_push in chunks": ["parallel=ep", "parallel.exchange=peer_push", "schedule=fixed",
                            "schedule.chunks=2"],
    "sharded": ["parallel=ep_fsdp"],
    "fssdp over peer": ["parallel=fssdp", "parallel.exchange=peer"],
}


def main() -> int:
    args = parse()
    try:
        truth, arms = reference(args.overrides), [arm for arm in chosen_arms(args) if args.only in arm.name]
    except ConfigErrors as error:
        print(error, file=sys.stderr)
        return error.code
    args.out.mkdir(parents=True, exist_ok=True)
    problem = train(truth, args.out)
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
    print(f"{len(arms) - len(wrong)} of {len(arms)} arms are the reference"
          + "".join(f"\n  not {name}" for name in wrong))
    return 1 if wrong or not arms else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of parity.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), help="of arms with several (cpu: 2, cuda: 4)")
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("overrides", nargs="*",
                        help="of moetrain train: the one training that is compared with the reference")
    args = parser.parse_intermixed_args()
    args.ranks = args.ranks or (4 if args.device == "cuda" else 2)
    return args


def chosen_arms(args: argparse.Namespace) -> list[Arm]:
    """The arms that the command line asks for: of the overrides, of a GPU, or of the CPU."""
    if args.overrides:
        arms = [given_arm(args.overrides, args.device)]
    elif args.device == "cuda":
        arms = gpu_arms(args.ranks)
    else:
        return cpu_arms(args.ranks)
    return arms if args.device == "cpu" else [
        version for arm in arms for version in (arm, arm._replace(name=f"{arm.name}, kernels", kernels=True))]


def cpu_arms(ranks: int) -> list[Arm]:
    alone = [Arm(f"alone, {dtype}", dtype, described(["run.device=cpu"])) for dtype in TOLERANCE]
    shared = ["run.device=cpu", f"run.nproc={ranks}"]
    return [*alone, *(Arm(f"{ranks} ranks, {way}", "float64", described([*shared, *overrides]))
                      for way, overrides in WAYS.items())]


def gpu_arms(ranks: int) -> list[Arm]:
    arms = [Arm(f"alone, {dtype}", dtype, described(["run.device=cuda"])) for dtype in TOLERANCE]
    shared = ["run.device=cuda", "run.share_gpu=true", f"run.nproc={ranks}"]
    arms += [Arm(f"{ranks} ranks, {way}", "float64", described([*shared, *overrides]))
             for way, overrides in WAYS.items()]
    rounded = described([*shared, *WAYS["peer_push"]])
    return [*arms, Arm(f"{ranks} ranks, peer_push, bfloat16", "bfloat16", rounded)]


if __name__ == "__main__":
    sys.exit(main())
