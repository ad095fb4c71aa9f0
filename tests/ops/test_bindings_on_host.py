"""csrc/*.cu as torch calls them: schemas, optional arguments, types, sizes; kernels are emulated on the CPU.

A process of its own loads the registrations (for the CPU instead of CUDA), declares the kernels in use, and
runs the tests of the ops: what they demand of the references, the kernels do too, gradients through torch's
autograd included.
"""

import subprocess
import sys

import pytest

from tests.ops.kernels_on_host import HERE, ROOT, bindings

# Left out: float64 routers, which have no kernel; tests that look inside the references, or that demand the
# same bits of two formulas.
TESTS = ("test_permute.py", "test_route_plan.py", "test_swiglu.py", "test_grouped_experts.py",
         "test_padded_experts.py", "test_peer_memory.py", "test_router.py")
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


@pytest.mark.slow
def test_the_ops_keep_their_promises_when_kernels_compute_them():
    done = subprocess.run([sys.executable, "-c", INSIDE, str(bindings()), SELECT,
                           *(str(HERE / name) for name in TESTS)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "with kernels for True" in done.stdout
