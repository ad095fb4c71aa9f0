"""Products of rows with the parameters of their experts; with whole forms, tests/moe/test_expert_form.py."""

import pytest
import torch

from moetrain.ops.expert_linear import expert_linear, expert_vectors

COUNTS = [2, 0, 3]


def leaves(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_()
            for shape in ((5, 4), (2, 8, 4), (1, 8, 4), (2, 8), (1, 8))]


def test_every_row_meets_its_expert() -> None:
    x_RI, homes, copies, vectors, copied = leaves()
    out_RO = expert_linear(x_RI, homes, copies, COUNTS) + expert_vectors(x_RI, vectors, copied, COUNTS)
    experts = [(homes[0], vectors[0])] * 2 + [(copies[0], copied[0])] * 3
    expected = torch.stack([matrix @ x_I + vector for x_I, (matrix, vector) in zip(x_RI, experts)])
    torch.testing.assert_close(out_RO, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda x_RI, homes, copies, vectors, copied:
        (expert_linear(x_RI, homes, copies, COUNTS) * expert_vectors(x_RI, vectors, copied, COUNTS)).sin(),
        leaves())


def test_sums_of_vectors_are_made_in_float32() -> None:
    rows, vectors = torch.zeros(4097, 4, dtype=torch.bfloat16), torch.zeros(1, 8, requires_grad=True)
    expert_vectors(rows, vectors, None, [4097]).sum().backward()
    assert vectors.grad.dtype == torch.float32 and (vectors.grad == 4097).all()      # no number of bfloat16


@pytest.mark.parametrize("op", ["expert_linear", "expert_vectors"])
@pytest.mark.parametrize("counts", [COUNTS, torch.tensor(COUNTS)], ids=["host", "device"])
def test_the_ops_say_what_they_return_without_data(op, counts) -> None:
    x_RI, homes, copies, vectors, copied = (leaf.float().detach().requires_grad_() for leaf in leaves())
    given = (x_RI, homes, copies) if op == "expert_linear" else (x_RI, vectors, copied)
    if not isinstance(counts, list):
        op += "_padded"
    torch.library.opcheck(getattr(torch.ops.moetrain, op).default, (*given, counts),
                          test_utils="test_faketensor")
