"""Stages of the first hour on a GPU: what each runs, how long it should take, and where it cannot run.

Times are guesses until a GPU has been seen. Together the stages fit two calls of ten minutes, each four
minutes.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.check.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"MOETRAIN_KERNELS": "1"}
# Virtual ranks wait for each other on one GPU: load kernels beforehand, and give streams queues of their own.
VIRTUAL_RANKS = {**KERNELS, "CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
# Overrides of a mesh; four ranks share the GPU, two where it is a simulated one.
MESHES = {
    "single": "",
    "ddp": "parallel=ddp",
    "ep": "parallel=ep",
    "fsdp": "parallel=fsdp",
    "ep_fsdp": "parallel=ep_fsdp parallel.ep=2",
    "fssdp": "parallel=fssdp",
}
EXCHANGES = {
    "peer": "parallel=ep parallel.exchange=peer",
    "peer_push": "parallel=ep parallel.exchange=peer_push",
    "chunks": "parallel=ep parallel.exchange=peer_push schedule=fixed schedule.chunks=2",
}
# Tests of tests/ops/test_kernels_on_gpu.py, by stage; a third stage has those that are not named here.
OPS = {
    "router": "test_router",
    "rows": "test_route_plan or test_rows or test_swiglu or test_weight_gradients",
}
# For compute-sanitizer, which is slow: small shapes.
SMALL_SHAPES = ("(test_route_plan and 1000) or (test_rows and 333) or (test_swiglu and 65) or "
                "(test_router and mixtral and 1000) or (weight and 136)")
TESTED = r"\b[1-9]\d* passed"              # pytest ends well, too, when it has skipped everything
SIMULATED = "no kernels on a simulated GPU"


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def tool(name: str, options: str, *more: object) -> list[str]:
    return python("-m", f"tools.{name}", *shlex.split(options), *more)


def gpu_tests(files: str, chosen: str = "") -> list[str]:
    only = ["-k", chosen] if chosen else []
    return python("-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *files.split(), *only)


class GpuStages:
    """The stages for one folder of results.

    Args:
        out: the folder.
        tiny: use sizes for a machine that simulates a GPU, where figures mean nothing.
    """

    def __init__(self, out: Path, tiny: bool) -> None:
        self.out, self.tiny = out, tiny

    def all(self) -> list[Stage]:
        """All stages, in the order in which they run."""
        return [self.environment(), self.build(), *self.kernels(), *self.meshes(),
                *self.kernels_in_training(), self.quickstart(), *self.benchmarks(), *self.sanitizers()]

    def found(self) -> dict[str, Any]:
        """Contents of environment.json, which the stage `environment` writes; empty before it ran."""
        file = self.out / "environment.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def without_kernels(self) -> str:
        """Reason why kernels cannot be used. Asked again for every stage, because the build comes between."""
        if self.tiny:
            return SIMULATED
        question = "from moetrain.ops import extension; print(extension.absent() or '')"
        asked = subprocess.run(python("-c", question), text=True, capture_output=True, cwd=ROOT,
                               env={**os.environ, **KERNELS})
        return asked.stdout.strip() or ("" if asked.returncode == 0 else "moetrain cannot be imported")

    def environment(self) -> Stage:
        return Stage("environment", "GPU, driver, torch, NCCL, compilers",
                     [python("-m", "tools.check.environment", "--out", self.out / "environment.json")],
                     usual_s=5, needed=True)

    def build(self) -> Stage:
        found = self.found()

        def skipped() -> str:
            if self.tiny:
                return SIMULATED
            missing = ("no nvcc (install a CUDA toolkit, or set CUDA_HOME): "
                       "plain torch runs instead of the kernels")
            return "" if found.get("nvcc") or found.get("kernels") == "usable" else missing

        command = tool("build_cuda", f"--archs {found.get('arch', '90a')} --jobs {os.cpu_count() or 1}")
        if not found.get("nvcc"):
            said = "the library of these sources was there; no nvcc to build it again"
            command = python("-c", f"print({said!r})")
        return Stage("build", "the CUDA kernels for this GPU", [command], usual_s=60, skipped=skipped,
                     needed=True)

    def kernels(self) -> list[Stage]:
        file, rest = "tests/ops/test_kernels_on_gpu.py", f"not ({' or '.join(OPS.values())})"
        made = [
            Stage("kernels-router", "routers against float64", [gpu_tests(file, OPS["router"])], usual_s=45),
            Stage("kernels-rows", "rows, SwiGLU and products against float64",
                  [gpu_tests(file, OPS["rows"])], usual_s=45),
            Stage("kernels-layer", "a whole layer, in a graph, beyond int32", [gpu_tests(file, rest)],
                  usual_s=45),
            Stage("kernels-peers", "rows through the memory of peers, virtual ranks on one GPU",
                  [gpu_tests("tests/comm/exchange/test_peer.py tests/ops/test_peer_memory.py")], usual_s=60),
        ]
        return [stage._replace(environment=VIRTUAL_RANKS if stage.name == "kernels-peers" else KERNELS,
                               skipped=self.without_kernels, counts=TESTED) for stage in made]

    def meshes(self) -> list[Stage]:
        dtypes = ["float32"] if self.tiny else ["float64", "bfloat16"]
        return [Stage(f"train-{name}", f"training on {name} against the CPU in float64",
                      [self.parity(f"train-{name}", dtype, mesh) for dtype in dtypes], usual_s=45)
                for name, mesh in MESHES.items()]

    def kernels_in_training(self) -> list[Stage]:
        alone = [self.parity("train-kernels", dtype, "", kernels=True) for dtype in ("float32", "bfloat16")]
        peers = [self.parity(f"train-{name}", "float64", words, kernels=True)
                 for name, words in EXCHANGES.items()]
        made = [Stage("train-kernels", "training with kernels against the CPU in float64", alone, usual_s=45),
                Stage("train-peers", "the same over the memory of peers", peers, usual_s=70)]
        return [stage._replace(skipped=self.without_kernels) for stage in made]

    def parity(self, name: str, dtype: str, mesh: str, kernels: bool = False) -> list[str]:
        """Command that trains a few steps on the GPU, and the same in one process on the CPU.

        Args:
            name: name of the result's folder.
            dtype: dtype of the run on the GPU.
            mesh: overrides of its mesh; empty for one process.
            kernels: train with kernels only, instead of with and without.
        """
        ranks = "parallel=single run.nproc=1"
        if mesh:
            ranks = f"run.share_gpu=true run.nproc={2 if self.tiny else 4}"
        steps = f"run.device=cuda run.dtype={dtype} run.steps={2 if self.tiny else 8}"
        options = "--device cuda --only kernels" if kernels else ""
        return tool("check.parity", options, "--out", self.out / f"{name}-{dtype}",
                    *shlex.split(f"{steps} {ranks} {mesh}"))

    def quickstart(self) -> Stage:
        run = [*shlex.split("experiment=quickstart run.device=cuda log.wandb=off"),
               f"run.dir={self.out / 'quickstart'}"]
        if self.tiny:
            run += shlex.split("run.steps=1 train.global_batch=2 eval.windows=1 data=synthetic")
        commands = [python("-m", "moetrain", verb, *run) for verb in ("train", "eval")]
        if not self.tiny:                  # synthetic tokens stand for no text
            prompt = ["generate.prompt=def main(", "generate.tokens=100"]
            commands.append(python("-m", "moetrain", "generate", *run, *prompt))
        return Stage("quickstart", "the README's first run on the GPU, its evaluation, some text", commands,
                     usual_s=60)

    def benchmarks(self) -> list[Stage]:
        def no_transformers() -> str:
            return "" if self.found().get("transformers") else "no transformers (pip install -e '.[hf]')"

        large = self.found().get("memory_gib", 0) > 100
        qwen3 = ("--device cuda --dtype bfloat16 --model qwen3_30b_a3b --vocab 151936 --seq 4096 "
                 "--head-chunk 2048 --zipf 1 --rounds 4 ")
        train = qwen3 + f"--layers {4 if large else 1} --batch 2 --peers grouped_mm"
        alone = qwen3 + f"--layers {6 if large else 3} --batch 8 --peers"
        ops = "--tokens 16384 --minutes 3"
        layer = "--device cuda --shapes qwen3 --tokens 16384 --rate 350e9 --latency 20e-6 --dtype bfloat16"
        balance = "--device cuda --pairs 15"
        if self.tiny:
            size = ("--device cuda --experts 4 --top-k 2 --dim 32 --layers 1 --heads 2 --kv-heads 2 "
                    "--expert-dim 32 --batch 2 --seq 16 --vocab 64 --rounds 1 --steps 1 --peers ")
            train, alone = size + "grouped_mm", size
            ops = "--small --shapes mixtral --only permute --repeats 1 --minutes 1"
            layer = ("--device cuda --shapes olmoe --ratios 1 --tokens 16 --ep 2 --divide 64 --rate 1e9 "
                     "--repeats 1")
            balance = "--device cuda --pairs 1"

        def bench(name: str, options: str, file: str) -> list[list[str]]:
            return [tool(name, options, "--out", self.out / file)]

        made = [
            Stage("bench-train", "a step of Qwen3-30B-A3B cut in depth, beside transformers",
                  bench("bench.train", train, "train.json"), usual_s=90, skipped=no_transformers),
            Stage("bench-alone", "the same with four times the tokens, ours alone",
                  bench("bench.train", alone, "alone.json"), usual_s=60, skipped=no_transformers),
            Stage("bench-ops", "every op beside the rates of the chip",
                  bench("bench.ops", ops, "ops.json"), usual_s=150),
            Stage("bench-layer", "an exchange hidden under experts, on an emulated link",
                  bench("bench.layer", layer, "layer.json"), usual_s=60),
            Stage("bench-balance", "what statistics of routers and the balance loss cost of a step",
                  bench("bench.balance", balance, "balance_cost.md"), usual_s=60),
        ]
        return [stage._replace(environment=KERNELS) for stage in made]

    def sanitizers(self) -> list[Stage]:
        """Stages of compute-sanitizer: memcheck for every access to memory, racecheck for shared memory."""
        def skipped() -> str:
            missing = "no compute-sanitizer (part of the CUDA toolkit)"
            return self.without_kernels() if self.found().get("compute-sanitizer") else missing

        tests = gpu_tests("tests/ops", SMALL_SHAPES)
        return [Stage(f"sanitizer-{kind}", f"compute-sanitizer's {kind} on small shapes",
                      [["compute-sanitizer", "--tool", kind, "--error-exitcode", "9", *tests]],
                      usual_s=100, skipped=skipped, counts=TESTED, environment=KERNELS, on_request=True)
                for kind in ("memcheck", "racecheck")]
