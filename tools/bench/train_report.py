"""Report of tools/bench/train.py: figures of each side, ratios of ours to the others, the machine."""

import argparse
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from moetrain.data.batches.batch import Batch
from moetrain.model.transformer import Transformer
from moetrain.ops import extension
from moetrain.train.micro_batches import step_context

BUSY = 1.3                                               # median over lower quintile


class Seconds(NamedTuple):
    """Seconds of each step, and of forward and backward in it."""

    step: list[float]
    fb: list[float]


def shares(rates: dict[str, float | None], flops: float) -> dict[str, float | None]:
    """Operations a second as shares of the chip's rates; None where a rate is unknown."""
    return {key: rate and flops / rate for key, rate in rates.items()}


def figures(seconds: Seconds, memory: dict[str, int], args: argparse.Namespace) -> dict[str, float]:
    """Times, tokens a second and memory of a side, for the report."""
    tokens = args.batch * args.seq
    step, fb = lower_quintile(seconds.step), lower_quintile(seconds.fb)
    return {"step_ms": step * 1e3, "fb_ms": fb * 1e3, "median_ms": median(seconds.step) * 1e3,
            "tokens_per_s": tokens / step,
            "kept_mb": memory["kept"] / 1e6, "peak_mb": memory["peak"] / 1e6,
            "busy": median(seconds.step) / step, "steps": len(seconds.step)}


def ratios(sides: dict[str, dict[str, float]]) -> dict[str, float | str]:
    """Ratios of ours to the peer with the fastest step; of memory to that one, and to the leanest of them."""
    ours, peers = sides["moetrain"], {name: side for name, side in sides.items() if name != "moetrain"}
    worst_busy = max(side["busy"] for side in sides.values())
    verdict = "machine busy, no verdict" if worst_busy > BUSY else "steady"
    steadiness = {"busy": worst_busy, "verdict": verdict}
    if not peers:
        return steadiness
    best = min(peers, key=lambda name: peers[name]["step_ms"])
    return {
        "best_peer": best,
        "speed_step": peers[best]["step_ms"] / ours["step_ms"],
        "speed_fb": min(side["fb_ms"] for side in peers.values()) / ours["fb_ms"],
        "speed_median": min(side["median_ms"] for side in peers.values()) / ours["median_ms"],
        "kept": ours["kept_mb"] / peers[best]["kept_mb"],
        "peak": ours["peak_mb"] / peers[best]["peak_mb"],
        "peak_of_leanest": ours["peak_mb"] / min(side["peak_mb"] for side in peers.values()),
        **steadiness,
    }


def show(report: dict) -> None:
    """Print the report as a table."""
    print(f"\n{'':26} {'step ms':>9} {'median':>9} {'fb ms':>9} {'tokens/s':>9} {'MFU':>6} {'of R':>6} "
          f"{'kept MB':>9} {'peak MB':>9}")
    for name, side in report["sides"].items():
        of_chip = (f" {side[key]:6.1%}" if side[key] else f" {'-':>6}" for key in ("mfu", "of_r"))
        print(f"{name:26}" + "".join(f" {side[key]:9.1f}" for key in ("step_ms", "median_ms", "fb_ms"))
              + f" {side['tokens_per_s']:9.0f}" + "".join(of_chip)
              + f" {side['kept_mb']:9.1f} {side['peak_mb']:9.1f}")
    for name, reason in report["left_out"].items():
        print(f"{name:26} left out: {reason}")
    ratio = report["ratios"]
    if "best_peer" in ratio:
        print(f"\nours against {ratio['best_peer']}: {ratio['speed_step']:.3f}x a step, "
              f"{ratio['speed_fb']:.3f}x forward and backward, {ratio['speed_median']:.3f}x by medians; "
              f"kept {ratio['kept']:.2f}, peak {ratio['peak']:.2f} "
              f"({ratio['peak_of_leanest']:.2f} of the leanest)")
    print(f"heaviest expert over the mean {report['imbalance']:.2f}; "
          f"median over lower quintile {ratio['busy']:.2f}: "
          f"{ratio['verdict']}; {report['machine']}")


@torch.no_grad()
def imbalance(model: Transformer, batch: Batch) -> float:
    """Rows of the heaviest expert over the mean, the largest of all layers."""
    stats = model(batch.tokens_BS, step_context(0, 1, batch)).stats
    return max(((sums.counts_E.max() / sums.counts_E.double().mean()).item() for sums in stats.values()),
               default=1.0)


def machine(device: torch.device) -> dict[str, str | int | float]:
    """Device, versions, load and commit of the measurement."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
            "kernels": extension.absent() or "in use", "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1), "commit": commit.stdout.strip()}


def lower_quintile(values: list[float]) -> float:
    return sorted(values)[len(values) // 5]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
