"""Whatever composition of JAX's transformations runs on XLA runs for the default, and is the same.

Compositions are drawn: of functions, of arguments, and of derivatives to third order with all that
JAX wraps around a function.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rnnattn import LSTMState, dot_product_attention, init_lstm, lstm, lstm_step, reference, rope
from tests.attention_cases import quick

pytestmark = pytest.mark.slow

draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.float32)
PARAMS = init_lstm(jax.random.key(0), 2, 3)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "lstm": {"params": PARAMS, "x": draw(1, 2, 3, 2), "h": draw(2, 2, 3), "c": draw(3, 2, 3)},
    "lstm_step": {"params": PARAMS, "x": draw(1, 2, 2), "h": draw(2, 2, 3), "c": draw(3, 2, 3)},
    "attention": {
        "query": draw(1, 1, 4, 2, 2),
        "key": draw(2, 1, 3, 1, 2),
        "value": draw(3, 1, 3, 1, 3),
        "bias": draw(4, 1, 2, 4, 3),
        "scale": jnp.float32(0.7),
        "sinks": draw(5, 2),
    },
    "rope": {"x": draw(1, 1, 3, 1, 4), "positions": draw(2, 3)},
}


def functions(name, plain) -> Any:
    """{argument: array} → array, by the default, or without kernels or a rule of its own."""
    if name == "rope":
        return lambda a: (reference.rope if plain else rope)(a["x"], a["positions"])
    if name == "attention":
        implementation: Any = "dense" if plain else None
        return lambda a: dot_product_attention(**a, implementation=implementation)
    if name == "lstm_step":
        # one step of the sequence is the function on XLA
        def one_step(a):
            params, x, state = a["params"], a["x"], LSTMState(a["h"], a["c"])
            if plain:
                return lstm(params, x[:, None], state, implementation="xla")[1].c
            return lstm_step(params, x, state).c

        return one_step

    def sequence(a) -> Any:
        params, x, state = a["params"], a["x"], LSTMState(a["h"], a["c"])
        how: dict[str, Any] = {"implementation": "xla"} if plain else {}
        y, last = lstm(params, x, state, **how)
        return jnp.concatenate([y, last.c[:, None]], 1)

    return sequence


# ---- functions of arrays to functions of arrays -----------------------------------------------

weigh = lambda x: jnp.sum(jnp.sin(x) + x**2)
total = lambda tree: sum(weigh(x) for x in jax.tree.leaves(tree))
along = lambda x: jax.tree.map(lambda x: jnp.cos(3 * x), x)


def _jacobian(f, x, mode):
    """All of a Jacobian of a scalar of x, for what is small enough."""
    return mode(lambda x: total(f(x)))(x)


DERIVATIVES = {
    "grad": lambda f: lambda x: jax.grad(lambda x: total(f(x)))(x),
    "vjp": lambda f: lambda x: jax.vjp(f, x)[1](along(f(x)))[0],
    "jacrev": lambda f: (
        lambda x: jax.jacrev(lambda x: jax.tree.map(lambda y: y.ravel()[:2], f(x)))(x)
    ),
    # of what has been differentiated in reverse
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (along(x),))[1],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](along(x)),
    "jacfwd": lambda f: lambda x: _jacobian(f, x, jax.jacfwd),
}
REVERSE, FORWARD = ("grad", "vjp", "jacrev"), ("jvp", "linearize", "jacfwd")


def _vmap(f):
    def over_axis(x):
        results = jax.vmap(f)(jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), x))
        return jax.tree.map(lambda y: y[0] - y[1], results)

    return over_axis


def _scan(f):
    def twice(x):
        results = lax.scan(lambda _, s: (None, f(jax.tree.map(lambda x: s * x, x))), None, SHARES)
        return jax.tree.map(lambda y: y.sum(0), results[1])

    return twice


SHARES = jnp.array([1.0, 0.5], jnp.float32)


def _while(f):
    """Reverse mode does not go through one; what is inside may be a gradient."""

    def loop(x):
        start = (jnp.int32(0), jax.tree.map(jnp.zeros_like, jax.eval_shape(f, x)))
        body = lambda carry: (carry[0] + jnp.int32(1), f(x))
        return lax.while_loop(lambda carry: carry[0] < jnp.int32(2), body, start)[1]

    return loop


def _custom_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return wrapped


def _cond(f):
    return lambda x: lax.cond(
        jax.tree.leaves(x)[0].sum() > -1e9, f, lambda x: jax.tree.map(jnp.negative, f(x)), x
    )


policies = jax.checkpoint_policies
WRAPPERS = {
    "jit": jax.jit,
    "vmap": _vmap,
    "scan": _scan,
    "cond": _cond,
    "checkpoint": jax.checkpoint,
    "checkpoint dots": partial(jax.checkpoint, policy=policies.dots_saveable),
    "checkpoint nothing": partial(jax.checkpoint, policy=policies.nothing_saveable),
    "checkpoint everything": partial(jax.checkpoint, policy=policies.everything_saveable),
}


def composition(rng):
    """Names of what is applied, the innermost first: up to three derivatives."""
    steps: list[str] = []
    orders = rng.integers(1, 4)
    for order in range(orders):
        # forward mode does not go through a rule for cotangents, only through what is made of it
        wrappers, derivatives = (*WRAPPERS, "custom_jvp")[: None if order else -1], REVERSE
        if rng.random() < 0.7:
            steps.append(str(rng.choice(wrappers)))
        if order and rng.random() < 0.4:
            derivatives = FORWARD
        steps.append(str(rng.choice(derivatives)))
    last = str(rng.choice(["", "while", "jit"] + ["disable_jit"] * int(orders == 1)))
    return [*steps, last] if last else steps


ALL: dict[str, Any] = {**DERIVATIVES, **WRAPPERS, "custom_jvp": _custom_jvp, "while": _while}


def assert_the_default_is_right(name, argument, steps):
    arguments = ARGUMENTS[name]
    results = []
    for plain in (False, True):
        function = functions(name, plain)
        f = lambda x, function=function: function({**arguments, argument: x})
        for step in steps:
            f = f if step == "disable_jit" else ALL[step](f)
        # in one compilation, unless it is to be without any
        with jax.disable_jit("disable_jit" in steps):
            f = f if "disable_jit" in steps else quick(f)
            results.append(f(arguments[argument]))
    actual, expected = (jax.tree.leaves(x) for x in results)
    largest = max(float(jnp.abs(x).max()) for x in expected)
    for a, e in zip(actual, expected, strict=True):
        assert np.isfinite(e).all(), steps
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * largest, err_msg=str(steps))


DRAWN = 5


@pytest.mark.parametrize("seed", range(DRAWN))
@pytest.mark.parametrize("name", ARGUMENTS)
def test_drawn_compositions(name, seed):
    rng = np.random.default_rng([seed, *name.encode()])
    argument = str(rng.choice(list(ARGUMENTS[name])))
    assert_the_default_is_right(name, argument, composition(rng))


@pytest.mark.parametrize("argument", ARGUMENTS["attention"])
def test_hessians_of_attention(argument):
    """The second derivative not compiled as a whole: `jit` of the call alone is transposed."""

    def hessian(plain):
        f = functions("attention", plain)
        of_one = lambda x: total(f({**ARGUMENTS["attention"], argument: x}))
        return jax.hessian(of_one)(ARGUMENTS["attention"][argument])

    np.testing.assert_allclose(hessian(False), hessian(True), rtol=1e-4, atol=1e-4)


def test_a_gradient_of_a_gradient_through_checkpointed_layers():
    layers = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), init_lstm(jax.random.key(0), 3, 3))

    def gradient(implementation):
        layer = lambda x, p: (lstm(p, x, implementation=implementation)[0], None)
        loss = lambda x: total(lax.scan(jax.checkpoint(layer), x, layers)[0])
        return jax.grad(lambda x: total(jax.grad(loss)(x)))(draw(1, 2, 4, 3))

    actual, expected = (quick(partial(gradient, how))() for how in (None, "xla"))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nothing_under_vmap(name):
    """An axis of size 0, of values and gradients."""
    f = functions(name, False)
    none = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), ARGUMENTS[name])
    one = jax.eval_shape(f, ARGUMENTS[name])
    assert jax.vmap(f)(none).shape == (0, *one.shape)
    for argument, x in none.items():
        of_one = lambda x, argument=argument: f({**ARGUMENTS[name], argument: x})
        gradient = jax.vmap(jax.grad(lambda x, f=of_one: total(f(x))))(x)
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, x)


@pytest.mark.parametrize("name", ["lstm", "lstm_step", "attention"])
def test_debug_nans_names_what_is_not_a_number(name):
    poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), ARGUMENTS[name])
    for f in (functions(name, False), jax.grad(lambda a: total(functions(name, False)(a)))):
        f(ARGUMENTS[name])
        with jax.debug_nans(True):
            f(ARGUMENTS[name])
            with pytest.raises(FloatingPointError):
                f(poison)


@pytest.mark.parametrize("name", ["attention", "rope"])
def test_a_gradient_is_that_whichever_was_asked_for_before(name):
    """With respect to one argument after the other, round and round, as JAX caches its traces."""
    f, arguments = functions(name, False), ARGUMENTS[name]
    together = jax.grad(lambda a: total(f(a)))(arguments)
    for wrap in (lambda f: f, jax.checkpoint, jax.jit):
        for argument, expected in together.items():
            of_one = lambda x, argument=argument: total(f({**arguments, argument: x}))
            actual = jax.grad(wrap(of_one))(arguments[argument])
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=argument)
