"""Head and cross-entropy by chunks equal the plain ones: value and every gradient, and in less memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.linear_cross_entropy import linear_cross_entropy

ROWS, WIDTH, VOCABULARY = 13, 6, 17
TARGETS = {
    "some without": torch.tensor([3, -1, 0, 16, -1, 5, 5, 2, 9, -1, 1, 0, 12]),
    "none at all": torch.full((ROWS,), -1),
    "all": torch.arange(ROWS),
}


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    x_RD = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    storage = torch.float64 if dtype == torch.float64 else torch.float32
    bias_V = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    return (x_RD.to(dtype).requires_grad_(),
            *(parameter.to(storage).requires_grad_() for parameter in (head_VD, bias_V)))


def plain(x_RD: Tensor, head_VD: Tensor, targets_R: Tensor, bias_V: Tensor | None = None) -> Tensor:
    logits = F.linear(x_RD, head_VD.to(x_RD.dtype), None if bias_V is None else bias_V.to(x_RD.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets_R, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_are_those_of_the_plain_path(biased, targets, chunk, dtype, tolerance):
    ours, theirs = inputs(dtype)[:2 + biased], inputs(dtype)[:2 + biased]
    value = linear_cross_entropy(*ours[:2], TARGETS[targets], chunk, *ours[2:])
    expected = plain(*theirs[:2], TARGETS[targets], *theirs[2:])
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    (0.3 * value).backward()
    (0.3 * expected).backward()
    for mine, other in zip(ours, theirs):
        assert mine.grad.dtype == other.grad.dtype
        torch.testing.assert_close(mine.grad, other.grad, rtol=tolerance, atol=tolerance)


def test_no_rows_are_no_loss():
    x_RD, head_VD, _ = inputs(torch.float64, rows=0)
    value = linear_cross_entropy(x_RD, head_VD, torch.zeros(0, dtype=torch.int64), 4)
    value.backward()
    assert value.item() == 0 and not head_VD.grad.any() and x_RD.grad.shape == (0, WIDTH)


def test_a_gradient_that_nobody_wants_is_not_made():
    x_RD, head_VD, bias_V = inputs(torch.float64)
    linear_cross_entropy(x_RD.detach(), head_VD, TARGETS["all"], 4, bias_V.detach()).backward()
    assert x_RD.grad is None and head_VD.grad is not None and bias_V.grad is None


PEAK = """
import re, sys, torch
from pathlib import Path
from moetrain.ops.linear_cross_entropy import linear_cross_entropy
import torch.nn.functional as F

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

x, head = torch.randn(2048, 32, requires_grad=True), torch.randn(16384, 32, requires_grad=True)
targets = torch.arange(2048)
Path("/proc/self/clear_refs").write_text("5")            # resets the peak, which the parent process handed on
before = peak()
if int(sys.argv[1]):
    linear_cross_entropy(x, head, targets, int(sys.argv[1])).backward()
else:
    F.cross_entropy(F.linear(x, head), targets, reduction="sum").backward()
print(peak() - before)
"""


def peak_kib(chunk: int) -> int:
    """What the peak of a process grows by."""
    command = [sys.executable, "-c", PEAK, str(chunk)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_logits_of_all_rows_are_never_there():
    """Logits of all rows are 128 MiB here, as is their gradient; of a chunk 8 MiB."""
    whole, chunked = peak_kib(0), peak_kib(128)
    assert whole > 200 * 1024 and chunked < whole / 2, (whole, chunked)
