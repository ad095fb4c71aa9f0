"""The first hour on a GPU: build the kernels, hold them against float64, train on every mesh, measure.

    bash tools/check/gpu.sh                          go on with what has not passed, for ten minutes at most
    bash tools/check/gpu.sh --list                   the stages, and what became of each
    bash tools/check/gpu.sh --only train-ep build    these alone, also where they have passed
    bash tools/check/gpu.sh --out /elsewhere         results in another folder than build/gpu

Every stage ends within four minutes and writes its result at once, so that nothing is lost when the machine
goes away; two calls are enough for all of them. A call ends with a table, the lines that matter of what
failed, and the one file to send. docs/howto/first_gpu.md says what to expect.

Exit codes: 0 everything has passed, or was skipped with a reason; 1 a stage failed; 2 a mistake on the
command line; 3 not finished, call it again; 4 no GPU that torch can use; 128 + n stopped by signal n.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
from tools.check.environment import NO_GPU  # noqa: E402
from tools.check.gpu_stages import GpuStages  # noqa: E402
from tools.check.stages import Check  # noqa: E402

MINUTES = 9.5                              # of a call, so that it ends inside a limit of ten
OUT = Path("build/gpu")


def main() -> int:
    options = parse()
    out = options.out.resolve()
    again = f"bash tools/check/gpu.sh{f' --out {options.out}' * (options.out != OUT)}"
    stages = GpuStages(out, options.tiny)
    check = Check(stages.all(), out, again, sources())
    if unknown := set(options.only) - {stage.name for stage in check.stages}:
        print(f"no stage {', '.join(sorted(unknown))}; --list shows their names", file=sys.stderr)
        return 2
    if options.list:
        print(check.listing())
        return 0
    end = time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    check.results.pop("environment", None)                   # looked at in every call
    code = check.run(["environment"], end)
    if check.results.get("environment", {}).get("exit") == NO_GPU:
        return NO_GPU
    if code == 0 and options.only != ["environment"]:
        check = Check(stages.all(), out, again, check.sources)   # for the GPU that was found
        check.on(machine(stages.found()))
        code = check.run(options.only, end)
    check.write()
    print("", check.summary(), sep="\n")
    return code


def machine(found: dict[str, Any]) -> str:
    """Name the GPU and the torch that results hold for."""
    return f"{found['gpu']}, torch {found['torch']}"


def sources() -> str:
    """Commit of the checkout, and whether files differ from it."""
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}{' with changes' * bool(git('status', '--porcelain'))}" if commit else "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="bash tools/check/gpu.sh",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the stages and stop")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE",
                        help="these alone, also where they have passed")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the results ({OUT})")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of this call ({MINUTES})")
    parser.add_argument("--tiny", action="store_true",
                        help="sizes for a simulated GPU, where figures mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
