"""csrc/*.cu as torch calls them: schemas, optional arguments, types and sizes, with the kernels emulated on the CPU.

A process of its own loads the registrations (for the CPU instead of CUDA), declares the kernels in use, and runs the tests of
the ops: what they demand of the references, the kernels do too, gradients through torch's autograd included.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.kernels_on_host import CSRC, FLAGS, HERE, ROOT
from tests.support import needs

# Not: float64 routers, which have no kernel; what looks inside the references; what demands the same bits of two formulas.
TESTS = ("test_permute.py", "test_route_plan.py", "test_swiglu.py", "test_grouped_experts.py", "test_padded_experts.py",
         "test_peer_memory.py", "test_router.py")
SELECT = "not (test_router and float64) and not traced and not wait and not without_autograd"
INSIDE = """
import sys, pytest, torch
from moetrain.ops import extension, gating, grouped_experts, peer_memory, permute, route_plan, router, swiglu
torch.ops.load_library(sys.argv[1])
extension._REASON, extension._DEVICE = None, "cpu"
class Used:                                              # kernels that no test reached are not checked
    def pytest_sessionfinish(self, session):
        print("ran", session.testscollected, "with kernels for", extension.kernels_for(torch.zeros(1)))
sys.exit(pytest.main([*sys.argv[3:], "-q", "-p", "no:cacheprovider", "-k", sys.argv[2]], plugins=[Used()]))
"""


def built() -> Path:
    compiler, folder = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        needs.missing("no g++ (apt-get install g++): the kernels cannot be run on the host")
    flags = [flag for flag in FLAGS if "sanitize" not in flag] + ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    sources = [*sorted(CSRC.glob("*.*h")), *sorted(CSRC.glob("*.cu")), HERE / "cuda_on_host.h", HERE / "bindings_on_host.cpp"]
    digest = hashlib.sha256(f"{flags} {torch.__version__}".encode() + b"".join(path.read_bytes() for path in sources))
    library = ROOT / "build" / "kernels_on_host" / f"bindings-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")       # two workers may build at once
        subprocess.run([compiler, *flags, "-I", str(CSRC), "-I", str(HERE), "-isystem", str(folder / "include"),
                        str(HERE / "bindings_on_host.cpp"), "-L", str(folder / "lib"), "-ltorch_cpu", "-lc10",
                        "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


@pytest.mark.slow
def test_the_ops_keep_their_promises_when_kernels_compute_them():
    done = subprocess.run([sys.executable, "-c", INSIDE, str(built()), SELECT, *(str(HERE / name) for name in TESTS)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "with kernels for True" in done.stdout
