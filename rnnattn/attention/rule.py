"""The custom rule of attention, which joins the two halves of a schedule."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

import rnnattn.attention.dense as dense
from rnnattn.attention.equations import finite_lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(schedule, options, operands, masking):
    """O, in the dtype of the values, and L."""
    o, lse = schedule.forward(options._replace(keeps_o=False), operands, masking)
    return o.astype(operands.value.dtype), lse


def _attend_fwd(schedule, options, operands, masking):
    """Keeps operands, O and L, and which of the rest is differentiated: see `wanted`.

    O is that of the accumulator: rounded to 16 bits, Δ would lose what sets it apart from dP.
    """
    asked = tuple(map(wanted, (operands.bias, operands.scale, operands.score_arrays)))
    operands, masking = jax.tree.map(lambda x: x.value, (operands, masking))
    o, lse = schedule.forward(options, operands, masking)
    rounded = o.astype(operands.value.dtype)
    return (rounded, lse), (operands, masking, o, finite_lse(lse), asked)


def _attend_bwd(schedule, options, residuals, cotangents):
    """The gradient from the log-sum-exp: `rnnattn.attention.equations`."""
    *kept, asked = residuals
    wants_bias, wants_scale, wants_score = (flag.size > 0 for flag in asked)
    options = options._replace(
        bias_gradient=wants_bias,
        scale_gradient=wants_scale,
        score_gradient=wants_score,
        lse_gradient=not isinstance(cotangents[1], SymbolicZero),
    )
    operands = kept[0]
    gradient = schedule.backward(options, *kept, *instantiated(cotangents, operands))
    return as_given(gradient, operands), None


attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def wanted(x):
    """Whether an argument of a rule, or one of several, is differentiated, as a residual's size.

    JAX may read the residuals of one trace by the tree of another's, which then has to be the same.
    """
    perturbed = any(one.perturbed for one in jax.tree.leaves(x))
    return jnp.zeros(int(perturbed), jnp.bool)


def instantiated(cotangents, operands):
    """dO, in the dtype of the values as O was, and dL; arrays of zeros for symbolic ones."""
    # zeros of the type that the operands have in `jax.shard_map`
    zeros = lambda d: jnp.zeros_like(operands.value, d.dtype, shape=d.shape)
    full = lambda d: zeros(d) if isinstance(d, SymbolicZero) else d
    do, dlse = map(full, cotangents)
    return do.astype(operands.value.dtype), dlse


def as_given(gradient, operands):
    """The gradient in the dtypes of the operands; None where there is none."""
    absent = {name: None for name, d in gradient._asdict().items() if d is None}
    return jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, operands._replace(**absent))


# Without a rule, with JAX's own derivatives: as `attend`, and with the weights behind O and L.


def plain(schedule, options, operands, masking):
    return schedule.forward(options, operands, masking)


def with_weights(schedule, options, operands, masking):
    return dense.forward_with_weights(options, operands, masking)
