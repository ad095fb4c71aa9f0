"""Time every op of a MoE layer on one GPU, after a check against float64, as a ratio to the chip's own rates.

    python tools/build_cuda.py
    MOETRAIN_KERNELS=1 python -m tools.bench.ops --out ops.json                 goes on where it was stopped
    ... --only router,permute --shapes qwen3 --tokens 16384                     some cells
    ... --loads runs/x/loads.npz                                                routing as a run recorded it
    python -m tools.bench.ops --out ops.json --device cpu --small               the logic alone, not the times

A cell is an op, a shape, a number of tokens, a routing and a candidate; its result is written as soon as it
is there. Inputs rotate over more copies than the L2 cache holds. In the same process, before the cells: C,
the rate of a device copy (bytes read and written), and R, the rate of an 8192-cubed bfloat16 product. `of_c`
and `of_r` are the cell's floor (bytes, products) over its time, as fractions of those.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
from moetrain.ops import extension  # noqa: E402
from tools.bench.op_cases import CASES, SHAPES, SMALL, Case, case_of  # noqa: E402

TOKENS, SMALL_TOKENS = (8192, 16384, 32768), (32,)
MEANINGLESS = "times of a CPU, which say nothing about a GPU"


def seconds_of(function: Callable[[int], object], device: str, repeats: int) -> float:
    """Median seconds of a call.

    Args:
        function: gets the number of the call, to pick its copy of the inputs.
        device: cuda or cpu.
        repeats: number of timed calls.
    """
    for i in range(2 if device == "cpu" else 5):         # warm up: autotuners, allocator
        function(i)
    times = []
    for i in range(repeats):
        if device == "cpu":
            start = time.perf_counter()
            function(i)
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(i)
        end.record()
        times.append((begin, end))
    if device != "cpu":
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / 1e3 for begin, end in times]
    return statistics.median(times)


def rates(device: str, small: bool) -> dict[str, float]:
    """C in bytes a second and R in products and sums a second, measured in this process."""
    elements, side = (2**20, 256) if small else (2**29, 8192)
    source = torch.randn(elements, device=device).bfloat16()
    target = torch.empty_like(source)
    copy = seconds_of(lambda _: target.copy_(source), device, 20)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = seconds_of(lambda _: a @ b, device, 20)
    return {"C": 2 * source.nbytes / copy, "R": 2 * side**3 / product}


def copies_beyond_cache(inputs: list[Tensor], device: str) -> int:
    """Number of copies of the inputs that together exceed the L2 cache three times."""
    size = sum(tensor.nbytes for tensor in inputs)
    if device == "cpu" or size == 0:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(-(-3 * cache // size) + 1, 64, int(free * 0.2 // size)))


def error_of(case: Case, run: Callable, seed: int, device: str) -> float:
    """Largest |error| / |truth| of the results. Free memory is poisoned before, and NaN counts as infinite.

    Args:
        case: the case.
        run: the candidate.
        seed: seed of the inputs.
        device: cuda or cpu.
    """
    inputs = case.make(seed)
    fresh = [tensor.clone() if i in case.in_place else tensor for i, tensor in enumerate(inputs)]
    if device != "cpu":
        held = [torch.full((2**power,), -1, dtype=torch.int64, device=device) for power in (10, 17, 20, 24)]
        del held                                         # NaN, or -1: what the allocator hands out next
    results, truth = case.view(run(*fresh)), case.truth(*inputs)
    if case.in_place:                                    # truth is of one expert, named behind it
        results, truth = (results[0][int(truth[1])],), truth[:1]
    worst = 0.0
    for result, exact in zip(results, truth, strict=True):
        result, exact = result.detach().double(), exact.detach().double()
        error = float((result - exact).norm() / exact.norm().clamp(min=1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def measure(case: Case, run: Callable, chip: dict[str, float], device: str, repeats: int) -> dict:
    """Check a candidate, then time it.

    Args:
        case: the case.
        run: the candidate.
        chip: C and R of this process.
        device: cuda or cpu.
        repeats: number of timed calls.
    """
    error = error_of(case, run, 0, device)
    if not error <= case.tolerance:
        return {"error": error, "wrong": f"|error| / |truth| is above {case.tolerance}: not timed"}
    first = case.make(0)
    copies = [first, *(case.make(seed) for seed in range(1, copies_beyond_cache(first, device)))]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda i: run(*copies[i % len(copies)]), device, repeats)
    result = {"error": error, "seconds": seconds, "copies": len(copies),
              "of_c": case.bytes / seconds / chip["C"]}
    if case.flops:
        result["of_r"] = case.flops / seconds / chip["R"]
    if device != "cpu":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def load_of(path: Path | None, router: int) -> Callable[[int], Tensor]:
    """Loads of the experts: equal, or of the last recorded step, repeated or cut to the number of experts."""
    if path is None:
        return lambda experts: torch.ones(experts)
    loads = np.load(path)["loads"][-1, router].astype(np.float64)
    return lambda experts: torch.tensor(np.resize(loads[loads > 0], experts)) + 1e-3


def context(device: str) -> dict:
    """Date, chip, versions and commit of a process."""
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    chip = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "chip": chip, "driver": driver(device),
            "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit,
            "kernels": extension.absent() or "in use",
            **({"meaningless": MEANINGLESS} if device == "cpu" else {})}


def driver(device: str) -> str:
    """Version of the NVIDIA driver; empty on a CPU, and where its tool is not installed."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def write(path: Path, record: dict) -> None:
    """Replace the file of results atomically."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


def attempt(case: Case, run: Callable, chip: dict[str, float], device: str, repeats: int) -> dict:
    """Result of a cell; what a candidate cannot do here is a result, too, and so is how it fails."""
    try:
        return measure(case, run, chip, device, repeats)
    except ImportError as missing:
        return {"absent": str(missing)}
    except torch.OutOfMemoryError:
        return {"absent": "out of memory"}
    except Exception as error:                           # a peer's, or ours: the other cells go on
        return {"wrong": f"{type(error).__name__}: {error}"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True,
                        help="results; cells that are in it are not measured again")
    parser.add_argument("--only", default=",".join(CASES), help="ops")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", help="numbers of tokens")
    parser.add_argument("--loads", type=Path, help="loads.npz of a run, for its routing")
    parser.add_argument("--router", type=int, default=0, help="which router of it")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no cell after this time")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small widths and few tokens")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --small runs the logic alone")
    shapes = SMALL if options.small else SHAPES
    tokens = SMALL_TOKENS if options.small else TOKENS
    if options.tokens:
        tokens = [int(n) for n in options.tokens.split(",")]
    record = json.loads(options.out.read_text()) if options.out.exists() else {"cells": {}, "processes": []}
    chip, started = rates(options.device, options.small), time.monotonic()
    record["processes"].append(context(options.device) | chip)
    routing = "balanced" if options.loads is None else "recorded"
    load = load_of(options.loads, options.router)
    if options.device == "cpu":
        print(MEANINGLESS)
    print(f"C {chip['C'] / 1e9:.0f} GB/s   R {chip['R'] / 1e12:.1f} TFLOP/s   "
          f"kernels: {extension.absent() or 'in use'}")
    for count in tokens:
        for name in options.shapes.split(","):
            for op in options.only.split(","):
                case = case_of(op, shapes[name], count, load, options.device)
                for candidate, run in case.candidates.items():
                    key = f"{op} {name} T={count} {routing} {candidate}"
                    if key in record["cells"] or time.monotonic() - started > 60 * options.minutes:
                        continue
                    result = attempt(case, run, chip, options.device, options.repeats)
                    record["cells"][key] = result | {"process": len(record["processes"]) - 1}
                    write(options.out, record)
                    if "CUDA error" in result.get("wrong", ""):
                        sys.exit(f"{key}: {result['wrong']}; the device is lost to this process, start again")
                    rounded = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in result.items()}
                    print(key, rounded, flush=True)
    wrong = [key for key, result in record["cells"].items() if "wrong" in result]
    print(f"{len(record['cells'])} cells" + (f", WRONG: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
