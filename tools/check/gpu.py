"""The first hour on a GPU: build the kernels, hold them against float64, train on every mesh, measure. Ten minutes a call.

    bash tools/check/gpu.sh                          go on with what has not passed, for ten minutes at most
    bash tools/check/gpu.sh --list                   the stages, and what became of each
    bash tools/check/gpu.sh --only train-ep build    these alone, also where they have passed
    bash tools/check/gpu.sh --out /elsewhere         results in another folder than build/gpu

Every stage ends within four minutes and writes its result at once, so that nothing is lost when the machine goes away; two calls
are enough for all of them. A call ends with a table, the lines that matter of what failed, and the one file to send.

Exit codes: 0 everything has passed, or was skipped with a reason; 1 a stage failed; 2 a mistake on the command line; 3 not
finished, call it again; 4 no GPU that torch can use; 128 + n stopped by signal n.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.check.environment import NO_GPU  # noqa: E402
from tools.check.stages import Check, Stage  # noqa: E402

MINUTES = 9.5                              # of a call, so that it ends inside a limit of ten
KERNELS = {"MOETRAIN_KERNELS": "1"}
# A number of ranks and what they do, each against one process on the CPU in float64.
MESHES = {
    "single": [],
    "ddp": ["parallel=ddp"],
    "ep": ["parallel=ep"],
    "fsdp": ["parallel=fsdp"],
    "ep_fsdp": ["parallel=ep_fsdp", "parallel.ep=2"],
    "fssdp": ["parallel=fssdp"],
}
EXCHANGES = {"peer": ["parallel.exchange=peer"], "peer_push": ["parallel.exchange=peer_push"],
             "chunks": ["parallel.exchange=peer_push", "schedule=fixed", "schedule.chunks=2"]}
OPS = {"router": "test_router", "rows": "test_route_plan or test_rows or test_swiglu or test_weight_gradients"}
# compute-sanitizer is slow: small shapes. racecheck is about shared memory, memcheck about all else.
FEW = "(test_route_plan and 1000) or (test_rows and 333) or (test_swiglu and 65) or (test_router and mixtral and 1000) or (weight and 136)"
PYTEST = ["-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider"]
TESTED = r"\b[1-9]\d* passed"


class Plan:
    """The stages for one folder. found: what the stage `environment` has written. tiny: sizes for a machine that only simulates a GPU."""

    def __init__(self, out: Path, tiny: bool) -> None:
        self.out, self.tiny = out, tiny

    def found(self) -> dict[str, Any]:
        file = self.out / "environment.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def stages(self) -> list[Stage]:
        return [self.environment(), self.build(), *self.kernels(), *self.training(), self.quickstart(), *self.benchmarks(), *self.sanitizer()]

    def environment(self) -> Stage:
        return Stage("environment", "GPU, driver, torch, NCCL, compilers", [python("tools/check/environment.py", "--out", self.out / "environment.json")],
                     usual_s=5, needed=True)

    def build(self) -> Stage:
        def skipped() -> str:
            if self.found().get("nvcc") or self.found().get("kernels") == "usable":
                return ""
            return "no nvcc (install a CUDA toolkit, or set CUDA_HOME); plain torch runs instead of the kernels"

        command = python("tools/build_cuda.py", "--archs", self.found().get("arch") or "90a", "--jobs", os.cpu_count() or 1)
        built = python("-c", "print('the library of these sources is there; no nvcc to build it again')")
        return Stage("build", "the CUDA kernels for this GPU", [command if self.found().get("nvcc") else built], usual_s=60, skipped=skipped,
                     needed=True)

    def without_kernels(self) -> str:
        """Asked again after the build."""
        if self.tiny:
            return "no kernels on a simulated GPU"
        done = subprocess.run(python("-c", "from moetrain.ops import extension; print(extension.absent() or '')"), text=True,
                              capture_output=True, env={**os.environ, **KERNELS}, cwd=ROOT)
        return done.stdout.strip() or ("" if done.returncode == 0 else "moetrain cannot be imported")

    def kernels(self) -> list[Stage]:
        rest = f"not ({' or '.join(OPS.values())})"
        tests = [Stage(f"kernels-{name}", f"kernels against float64: {what}",
                       [python(*PYTEST, "tests/ops/test_kernels_on_gpu.py", "-k", chosen)], usual_s=45,
                       skipped=self.without_kernels, counts=TESTED, environment=KERNELS)
                 for name, what, chosen in (("router", "routers", OPS["router"]), ("rows", "rows and products", OPS["rows"]),
                                            ("layer", "a whole layer, its graph, its memory", rest))]
        # Virtual ranks wait for each other on one GPU: kernels are loaded beforehand, and streams do not share a queue.
        apart = {**KERNELS, "CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        peers = Stage("kernels-peers", "rows through the memory of peers, virtual ranks on one GPU",
                      [python(*PYTEST, "tests/comm/test_peer.py", "tests/ops/test_peer_memory.py")], usual_s=60,
                      skipped=self.without_kernels, counts=TESTED, environment=apart)
        return [*tests, peers]

    def training(self) -> list[Stage]:
        found = [Stage(f"train-{name}", f"training on {name} against the CPU in float64{' (one GPU, shared)' * bool(mesh)}",
                       [self.parity(f"train-{name}", dtype, mesh) for dtype in (["float32"] if self.tiny else ["float64", "bfloat16"])], usual_s=45)
                 for name, mesh in MESHES.items()]
        found.append(Stage("train-kernels", "training with kernels, alone, against the CPU in float64",
                           [self.parity("train-kernels", dtype, [], kernels=True) for dtype in ("float32", "bfloat16")], usual_s=45,
                           skipped=self.without_kernels))
        found.append(Stage("train-peers", "ep with kernels over the memory of peers, against the CPU in float64",
                           [self.parity(f"train-{name}", "float64", ["parallel=ep", *words], kernels=True) for name, words in EXCHANGES.items()],
                           usual_s=70, skipped=self.without_kernels))
        return found

    def parity(self, name: str, dtype: str, mesh: list[str], kernels: bool = False) -> list[str]:
        """Training of a few steps on the GPU, and the same in one process on the CPU."""
        ranks = ["run.share_gpu=true", f"run.nproc={2 if self.tiny else 4}"] if mesh else ["parallel=single", "run.nproc=1"]
        words = [word for word in mesh if not self.tiny or word != "parallel.ep=2"]
        with_kernels = ["--device", "cuda", "--only", "kernels"] if kernels else []
        return python("tools/check_parity.py", "--out", self.out / f"{name}-{dtype}", *with_kernels, "run.device=cuda", f"run.dtype={dtype}",
                      f"run.steps={2 if self.tiny else 8}", *ranks, *words)

    def quickstart(self) -> Stage:
        run = ["experiment=quickstart", "run.device=cuda", f"run.dir={self.out / 'quickstart'}", "log.wandb=off"]
        short = ["run.steps=1", "train.global_batch=2", "eval.windows=1", "data=synthetic"] if self.tiny else []
        shown = [] if self.tiny else [moetrain("generate", *run, "generate.prompt=def main(", "generate.tokens=100")]
        return Stage("quickstart", "the README's first run on the GPU: 800 steps, evaluation, text",
                     [moetrain("train", *run, *short), moetrain("eval", *run, *short), *shown], usual_s=60)

    def benchmarks(self) -> list[Stage]:
        def no_transformers() -> str:
            return "" if self.found().get("transformers") else "no transformers (pip install -e '.[hf]')"

        large = (self.found().get("memory_gib") or 0) > 100
        qwen3 = ["--device", "cuda", "--dtype", "bfloat16", "--model", "qwen3_30b_a3b", "--vocab", 151936, "--seq", 4096, "--head-chunk", 2048,
                 "--zipf", 1, "--rounds", 4]
        train = [*qwen3, "--layers", 4 if large else 1, "--batch", 2, "--peers", "grouped_mm"]
        alone = [*qwen3, "--layers", 6 if large else 3, "--batch", 8, "--peers"]
        layer = ["--shapes", "qwen3", "--tokens", 16384, "--rate", "350e9", "--latency", "20e-6", "--dtype", "bfloat16"]
        balance, ops = ["--pairs", 15], ["--tokens", 16384, "--minutes", 3]
        if self.tiny:
            size = ["--experts", 4, "--top-k", 2, "--dim", 32, "--layers", 1, "--heads", 2, "--kv-heads", 2, "--expert-dim", 32, "--seq", 16,
                    "--vocab", 64, "--rounds", 1, "--steps", 1, "--device", "cuda", "--batch", 2]
            train, alone = [*size, "--peers", "grouped_mm"], [*size, "--peers"]
            layer = ["--shapes", "olmoe", "--ratios", 1, "--tokens", 16, "--ep", 2, "--divide", 64, "--rate", "1e9", "--repeats", 1]
            balance, ops = ["--pairs", 1], ["--small", "--shapes", "mixtral", "--only", "permute", "--repeats", 1, "--minutes", 1]
        made = [Stage("bench-train", "a training step beside transformers, Qwen3-30B-A3B cut in depth",
                      [python("tools/bench_train.py", *train, "--out", self.out / "train.json")], usual_s=90, skipped=no_transformers),
                Stage("bench-alone", "the same with four times the tokens, ours alone",
                      [python("tools/bench_train.py", *alone, "--out", self.out / "train_alone.json")], usual_s=60, skipped=no_transformers),
                Stage("bench-ops", "every op against the rates of the chip", [python("tools/bench_ops.py", *ops, "--out", self.out / "ops.json")],
                      usual_s=150),
                Stage("bench-layer", "an exchange hidden under experts, emulated link",
                      [python("tools/bench_layer.py", "--device", "cuda", *layer, "--out", self.out / "layer.json")], usual_s=60),
                Stage("bench-balance", "what routers' statistics and the balance loss cost of a step",
                      [python("tools/bench_balance.py", "--device", "cuda", *balance, "--out", self.out / "balance_cost.md")], usual_s=60)]
        return [stage._replace(environment=KERNELS) for stage in made]

    def sanitizer(self) -> list[Stage]:
        def skipped() -> str:
            return self.without_kernels() if self.found().get("compute-sanitizer") else "no compute-sanitizer (part of the CUDA toolkit)"

        return [Stage(f"sanitizer-{tool}", f"compute-sanitizer's {tool} on small shapes",
                      [["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *python(*PYTEST, "tests/ops", "-k", FEW)]], usual_s=100,
                      skipped=skipped, counts=TESTED, environment=KERNELS, on_request=True) for tool in ("memcheck", "racecheck")]


def python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def moetrain(*words: str) -> list[str]:
    return python("-m", "moetrain", *words)


def main() -> int:
    options = parse()
    out = options.out.resolve()
    plan = Plan(out, options.tiny)
    again = " ".join(["bash tools/check/gpu.sh", *([f"--out {options.out}"] if options.out != parse([]).out else [])])
    check = Check(plan.stages(), out, again)
    if unknown := set(options.only) - {stage.name for stage in check.stages}:
        print(f"no stage {', '.join(sorted(unknown))}; --list shows their names", file=sys.stderr)
        return 2
    if options.list:
        for stage in check.stages:
            print(f"{stage.name:18} {check.state(stage.name) or ('when it is named' if stage.on_request else 'not run yet'):16} {stage.about}")
        return 0
    end = time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    code = environment(check, end)
    if code == NO_GPU:
        return code
    if code == 0 and options.only != ["environment"]:
        check = Check(plan.stages(), out, again)             # for the GPU that was found
        check.on(machine(plan.found()), sources())
        code = check.run(options.only, end)
    check.write()
    print("", check.summary(), sep="\n")
    return code


def environment(check: Check, end: float) -> int:
    """Run the first stage anew, whatever was found before; NO_GPU where there is none."""
    check.results.pop("environment", None)
    code = check.run(["environment"], end)
    return NO_GPU if check.results["environment"]["exit"] == NO_GPU else code


def machine(found: dict[str, Any]) -> str:
    return f"{found.get('gpu')}, torch {found.get('torch')}"


def sources() -> str:
    """The commit, and whether files differ from it."""
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}{' with changes' * bool(git('status', '--porcelain'))}" if commit else "unknown"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bash tools/check/gpu.sh")
    parser.add_argument("--list", action="store_true", help="show the stages and stop")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these alone, also where they have passed")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results (build/gpu)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of this call ({MINUTES})")
    parser.add_argument("--tiny", action="store_true", help="sizes for a simulated GPU: for the test of this script, the figures mean nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
