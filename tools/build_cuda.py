"""Build the CUDA kernels of csrc/, or check that they compile.

    python tools/build_cuda.py                    moetrain/_C_cuda.so, for sm_90a
    python tools/build_cuda.py --archs 80,90a
    python tools/build_cuda.py --check            compile only, and compare registers and spills of
                                                  every kernel with csrc/registers.json
    python tools/build_cuda.py --check --write    store what was found as the new baseline

Needs nvcc (from CUDA_HOME, PATH or /usr/local/cuda) and torch, whose CPU wheel suffices; no GPU. Objects are
kept in build/cuda by a hash of all their inputs, so an unchanged source is not compiled again. The library
uses torch's stable ABI: built once, it serves torch 2.11 and later, and any Python. moetrain loads it when
MOETRAIN_KERNELS=1 (moetrain/ops/extension.py).
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CSRC, CACHE, BASELINE = ROOT / "csrc", ROOT / "build" / "cuda", ROOT / "csrc" / "registers.json"
USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")
STABLE_ABI = "0x020b000000000000"                        # torch 2.11


class Kernel(NamedTuple):
    """Resources of a compiled kernel, per thread."""

    registers: int
    spilled: int                                         # bytes stored and loaded


def nvcc_path() -> Path | None:
    """Look for nvcc in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; None if it is in none of them."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(home) / "bin" / "nvcc" for home in homes]
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    return next((place for place in [*places, USUAL_PLACE] if place.exists()), None)


def find_nvcc() -> Path:
    """Path of nvcc; exits with what to do if there is none."""
    if found := nvcc_path():
        return found
    sys.exit(f"no nvcc: looked in CUDA_HOME, CUDA_PATH, PATH and {USUAL_PLACE.parent}\n"
             "  why:  the CUDA kernels are compiled by NVIDIA's compiler; "
             "everything else of moetrain runs without them\n"
             "  next: install a CUDA toolkit (12.8 or later), or set CUDA_HOME to where it is")


def release(nvcc: Path) -> str:
    """Release of CUDA that nvcc belongs to, such as 13.0."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", said)
    assert match is not None, said
    return match[1]


def flags(archs: list[str]) -> list[str]:
    """Options of nvcc for these compute capabilities."""
    import torch

    include = Path(torch.__file__).parent / "include"
    return ["-std=c++20", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
            "-Xcompiler", "-fPIC", "-Xptxas", "-v",
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
            "-I", str(CSRC), "-isystem", str(include)]


def compile_one(nvcc: Path, source: Path, archs: list[str]) -> tuple[Path, str]:
    """Compile a source, unless an object of the same inputs exists.

    Args:
        nvcc: path of the compiler.
        source: a file of csrc/.
        archs: compute capabilities.

    Returns:
        Path of the object, and what ptxas printed about its kernels.
    """
    import torch

    arguments = flags(archs)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{arguments} {version} {torch.__version__}".encode())
    for path in [source, *sorted(CSRC.glob("*.cuh")), *sorted(CSRC.glob("*.h"))]:
        digest.update(path.read_bytes())
    built = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    log = built.with_suffix(".log")
    if not (built.exists() and log.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        command: list[str | Path] = [nvcc, *arguments, "-c", source, "-o", unfinished]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
        log.write_text(done.stderr)
        unfinished.rename(built)
    return built, log.read_text()


def compile_all(archs: list[str], jobs: int) -> dict[str, tuple[Path, str]]:
    """Compile all sources, `jobs` at a time; what `compile_one` returns, by file name."""
    nvcc = find_nvcc()
    sources = sorted(CSRC.glob("*.cu"))
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip([source.name for source in sources],
                        pool.map(lambda source: compile_one(nvcc, source, archs), sources)))


def kernels_of(log: str) -> dict[str, Kernel]:
    """Registers and spills of each kernel by mangled name and architecture, from the output of `ptxas -v`."""
    found, name, spilled = {}, "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, spilled = f"{match[1]} {match[2]}", 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        elif (match := re.search(r"Used (\d+) registers", line)) and name:
            found[name] = Kernel(int(match[1]), spilled)
            name = ""
    return found


def compare(found: dict[str, Kernel], baseline: dict[str, list[int]]) -> tuple[list[str], list[str]]:
    """Compare kernels with the baseline: those that spill more than before, and other changes."""
    wrong, changed = [], []
    for name, kernel in found.items():
        registers, spilled = baseline.get(name, (None, 0))
        if kernel.spilled > spilled:
            wrong.append(f"{name}: spills {kernel.spilled} bytes, before {spilled}")
        elif (kernel.registers, kernel.spilled) != (registers, spilled):
            changed.append(f"{name}: {kernel.registers} registers, before {registers}")
    return wrong, changed + [f"{name}: gone" for name in baseline.keys() - found.keys()]


def check(archs: list[str], jobs: int, write: bool) -> int:
    """Compile all kernels and compare them with the baseline.

    Args:
        archs: compute capabilities.
        jobs: number of compilers at a time.
        write: store what was found as the baseline first.

    Returns:
        Exit status: 1 if a kernel spills more than before.
    """
    found: dict[str, Kernel] = {}
    for _, log in compile_all(archs, jobs).values():
        found |= kernels_of(log)
    if write:
        BASELINE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    wrong, changed = compare(found, json.loads(BASELINE.read_text()))
    most = max(found.values(), key=lambda kernel: kernel.registers)
    print(f"{len(found)} kernels compile for {','.join(archs)}; at most {most.registers} registers; "
          f"{sum(kernel.spilled for kernel in found.values())} bytes spilled in all")
    for line in changed:
        print("changed", line)
    for line in wrong:
        print("WRONG  ", line)
    return 1 if wrong else 0


def build(archs: list[str], jobs: int) -> int:
    """Compile all kernels and link the library; returns the exit status."""
    import torch

    from moetrain.ops.extension import LIBRARY, write_label

    objects = [built for built, _ in compile_all(archs, jobs).values()]
    libraries = Path(torch.__file__).parent / "lib"
    present = [name for name in ("torch_cpu", "torch_cuda", "c10") if (libraries / f"lib{name}.so").exists()]
    linked = [f"-l{name}" for name in present]
    subprocess.run([find_nvcc(), "-shared", *objects, "-L", libraries, *linked, "-o", LIBRARY], check=True)
    write_label(LIBRARY, archs, release(find_nvcc()))
    size = LIBRARY.stat().st_size / 1e6
    print(f"{LIBRARY} ({size:.1f} MB) for {','.join(archs)}; in use with MOETRAIN_KERNELS=1")
    return 0


def main() -> int:
    """Build or check, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archs", default="90a", help="compute capabilities, comma-separated")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="compilers at once")
    parser.add_argument("--check", action="store_true", help="compile only and look at registers and spills")
    parser.add_argument("--write", action="store_true", help="with --check: store the baseline")
    options = parser.parse_args()
    archs = options.archs.split(",")
    return check(archs, options.jobs, options.write) if options.check else build(archs, options.jobs)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
