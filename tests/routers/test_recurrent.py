"""A router whose state goes over layers: the paper's equations in numpy, torch's cell, and its arms."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moetrain.ops.gating import top_k
from moetrain.routers.base import RouterContext
from moetrain.routers.recurrent import NAME, RecurrentCell, RecurrentRouter
from moetrain.routers.shared import TiedModules

T, D, E, K, H = 7, 5, 6, 2, 4


def build(layers: int = 2, **arguments) -> tuple[list[RecurrentRouter], TiedModules]:
    """Routers of a model of so many layers, with numbers, and what they share."""
    routers = [RecurrentRouter(dim=D, num_experts=E, top_k=K, **{"state_dim": H, **arguments})
               for _ in range(layers)]
    tied = TiedModules(routers[0].shared_modules())
    generator = torch.Generator().manual_seed(0)
    for module in (*routers, tied):
        module.double()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.6, generator=generator)
    return routers, tied


def tokens(layers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(T, D, generator=generator, dtype=torch.float64) for _ in range(layers)]


def routed(routers, tied, xs):
    """Decisions of consecutive layers."""
    found, carry = [], None
    for router, x_TD in zip(routers, xs):
        found.append(router.route(x_TD, RouterContext(tied=tied, carry=carry)))
        carry = found[-1].carry
    return found


def by_the_paper(routers, cell: RecurrentCell, xs) -> list[np.ndarray]:
    """Probabilities [T, E] of each layer, token by token and gate by gate."""
    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    (w_r, w_u, w_c), (u_r, u_u, u_c), (a_r, a_u, a_c), (b_r, b_u, b_c) = (
        np.split(parameter.detach().numpy(), 3) for parameter in cell.parameters())
    states, found = np.zeros((T, H)), []
    for router, x_TD in zip(routers, xs):
        probs = np.zeros((T, E))
        for t in range(T):
            x, h = router.project.detach().numpy() @ x_TD[t].numpy(), states[t]
            r, u = sigmoid(w_r @ x + a_r + u_r @ h + b_r), sigmoid(w_u @ x + a_u + u_u @ h + b_u)
            states[t] = (1 - u) * np.tanh(w_c @ x + a_c + r * (u_c @ h + b_c)) + u * h
            z = np.exp(router.weight.detach().numpy() @ states[t])
            probs[t] = z / z.sum()
        found.append(probs)
    return found


def test_three_layers_follow_the_papers_equations():
    routers, tied = build(3)
    xs = tokens(3)
    for routing, probs in zip(routed(routers, tied, xs), by_the_paper(routers, tied[NAME], xs)):
        order = np.argsort(-probs, axis=1)[:, :K]
        chosen = np.take_along_axis(probs, order, 1)
        assert routing.ids_TK.numpy().tolist() == order.tolist()
        expected = chosen / chosen.sum(1, keepdims=True)
        np.testing.assert_allclose(routing.weights_TK.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind, torchs", [("gru", nn.GRUCell), ("rnn", nn.RNNCell)])
def test_the_cells_are_torchs(kind, torchs):
    ours, theirs = RecurrentCell(width=H, kind=kind).double(), torchs(H, H).double()
    ours.load_state_dict(theirs.state_dict())
    x_TH, state_TH = torch.randn(2, T, H, dtype=torch.float64)
    torch.testing.assert_close(ours(x_TH, state_TH), theirs(x_TH, state_TH))


def test_a_cell_of_zeros_routes_uniformly():
    """It is not the linear router: every logit is 0, and ties go to the lower id."""
    routers, tied = build()
    for parameter in tied.parameters():
        nn.init.zeros_(parameter)
    for routing in routed(routers, tied, tokens()):
        torch.testing.assert_close(routing.stats.prob_sum_E, torch.full((E,), T / E, dtype=torch.float64))
        assert routing.ids_TK.tolist() == [[0, 1]] * T and not routing.carry.any()


def test_identity_is_topk_of_the_projected_token():
    (router, _), tied = build(cell="identity", state_dim=D)
    nn.init.eye_(router.project)
    (x_TD, _) = tokens()
    (routing, *_) = routed([router], tied, [x_TD])
    assert not tied and routing.carry is None
    assert routing.ids_TK.equal(top_k(x_TD @ router.weight.T, K)[1])


def test_without_recurrent_weights_and_update_gate_the_layer_before_is_forgotten():
    """That, and reset=every_layer, are the paper's arm that passes no state."""
    routers, tied = build()
    reset, _ = build(reset="every_layer")
    with torch.no_grad():
        tied[NAME].weight_hh.zero_()
        tied[NAME].bias_ih[H:2 * H] = -1e4                   # the update gate
    xs = tokens()
    for other in ([xs[0], xs[1]], [-3 * xs[0], xs[1]]):
        torch.testing.assert_close(routed(routers, tied, other)[1].weights_TK,
                                   routed(reset, tied, xs)[1].weights_TK)
    assert routed(reset, tied, xs)[0].carry is None


@pytest.mark.parametrize("detach", [False, True])
def test_a_later_layer_trains_the_projection_of_an_earlier_one_unless_detached(detach):
    routers, tied = build(3, detach=detach)
    routed(routers, tied, tokens(3))[-1].weights_TK[:, 0].sum().backward()
    first = [router.project.grad is not None and bool(router.project.grad.any()) for router in routers]
    assert first == ([False, False, True] if detach else [True, True, True])


def test_tokens_do_not_see_each_other():
    routers, tied = build()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    ours, permuted = (routed(routers, tied, xs)[1].carry for xs in (tokens(), [x[order] for x in tokens()]))
    torch.testing.assert_close(permuted, ours[order])


def test_layers_may_have_cells_of_their_own():
    routers, tied = build(shared_cell=False)
    assert not tied and routers[0].cell is not routers[1].cell
    assert routed(routers, tied, tokens())[1].carry.shape == (T, H)
