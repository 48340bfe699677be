"""Units that torch has no layer for, against loops in torch under its own differentiation."""

from functools import partial

import jax
import numpy as np
import pytest

from rnnattn.recurrent.units.layer_norm import LayerNormLSTMParams
from tests.lstm_cases import assert_close, value_and_gradients
from tests.units import UNITS, make_case

torch = pytest.importorskip("torch")

T, B, D, H = 6, 3, 2, 8


def against(step, case, run):
    """The outputs and all gradients of `run`, and those of a loop of `step(params, x, state)`."""
    leaf = lambda a: torch.tensor(np.asarray(a), requires_grad=True)
    given = jax.tree.map(leaf, tuple(case[:3]))
    params, x, state = given
    rows = []
    for t in range(T):
        state = step(params, x[:, t], state)
        rows.append(state[0])
    outputs = (torch.stack(rows, dim=1), state)
    cotangents = [torch.tensor(np.asarray(a)) for a in jax.tree.leaves(case.cotangents)]
    torch.autograd.backward(jax.tree.leaves(outputs), cotangents)
    expected = jax.tree.map(lambda a: a.detach().numpy(), outputs)
    gradients = jax.tree.map(lambda a: a.grad.numpy(), given)
    assert_close(value_and_gradients(run, case), (expected, gradients), 1e-11)


def test_the_lstm_with_layer_norm():
    """Norms are `torch.nn.functional.layer_norm`, which `torch.nn.LayerNorm` calls."""
    family = UNITS["layer-norm lstm"]
    norm = torch.nn.functional.layer_norm

    def step(params: LayerNormLSTMParams, x, state):
        of_x = norm(x @ params.w_x, (4 * H,), params.k_x, params.b)
        z = of_x + norm(state.h @ params.w_h, (4 * H,), params.k_h)
        i, f, g, o = z.chunk(4, dim=-1)
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c, (H,), params.k_c, params.b_c).tanh()
        return type(state)(h, c)

    against(step, make_case(family, T, B, D, H), family.run)


@pytest.mark.parametrize("name", ["slstm", "slstm, exponential"])
def test_the_slstm(name):
    """Beck et al. 2024: the exponential gates with the stabiliser m, in heads."""
    family = UNITS[name]

    def step(exponential, params, x, state):
        N, width, _ = params.w_h.shape
        heads = torch.einsum("bnk,nkj->bnj", state.h.reshape(B, N, width), params.w_h)
        of_h = heads.reshape(B, N, 4, width).transpose(1, 2).reshape(B, 4 * H)
        z_i, z_f, z_g, z_o = (x @ params.w_x + of_h + params.b).chunk(4, dim=-1)
        log_f = z_f if exponential else torch.nn.functional.logsigmoid(z_f)
        m = torch.maximum(log_f + state.m, z_i)
        f, i = (log_f + state.m - m).exp(), (z_i - m).exp()
        c, n = f * state.c + i * z_g.tanh(), f * state.n + i
        return type(state)(z_o.sigmoid() * c / n, c, n, m)

    case = make_case(family, T, B, D, H)
    case = case._replace(state=case.state._replace(n=abs(case.state.n) + 1))
    against(partial(step, name != "slstm"), case, family.run)
