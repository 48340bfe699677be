"""The blockwise schedule of attention: memory that grows with T + S, not with their product.

Blocks of queries go over blocks of keys. Forward, a block's softmax is kept as a running peak, sum
and weighted sum; backward, the weights are computed again from the log-sum-exp:

    forward   per block: s, P v                     per query block: O, L
    backward  per block: s, P, dP, dS, dv, dk, dq

Which blocks there are, and which of them are skipped: `rnnattn.attention.blocks`.

`forward` is the same schedule with a rule for tangents; the transpose of that rule, which JAX
makes, is the gradient again, so that every order and mode keeps the memory linear.

This module holds no algebra of its own: see `rnnattn.attention.equations`, also for the axes.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rnnattn.attention.blocks import (
    Grid,
    blocks_to_visit,
    cut_one,
    in_blocks,
    visible_in,
    with_block_map,
)
from rnnattn.attention.dropout import dropout_mask
from rnnattn.attention.equations import (
    Softmax,
    block_gradient,
    block_tangent,
    finish_tangent,
    row_sums,
    score,
    sinks_gradient,
    sum_to,
)
from rnnattn.attention.problem import Operands

# Measured: benchmarks/README.md, "How attention's schedule is chosen".
FORWARD_BLOCK = (512, 512)  # on a CPU: queries of all heads of a group, keys
BACKWARD_BLOCK = (512, 256)
RANGES_BLOCK = (128, 128)  # where queries have ranges of keys: these may end in any block
BLOCK_LOGITS = 2**26  # elsewhere, of all rows and heads together: 256 MiB in float32
_LEAST_BLOCK = 128  # queries of a head, and keys
_LONGEST_RANGES_BLOCK = 512  # the same, where queries have ranges of keys
_TANGENT_LOGITS = 2**18  # of a block, all heads together, in the rule for tangents
_LEAST_TANGENT_BLOCK = 64


def _grid(operands, longest, head=None):
    """Blocks of at most `longest` queries, those of a group's heads together, and keys."""
    _, _, G, T, _ = operands.query.shape
    queries, keys = longest
    return Grid(in_blocks(T, max(queries // G, 1)), in_blocks(operands.key.shape[2], keys), head)


def _longest_block(in_cache, operands, masking, head):
    """Queries of a group's heads and keys of a block; `in_cache` suits a CPU and one head."""
    if head:
        return in_cache if masking.key_ranges is None else RANGES_BLOCK
    queries, keys = _large_block(operands)
    if masking.key_ranges is None:
        return queries, keys
    G = operands.query.shape[2]
    return min(queries, G * _LONGEST_RANGES_BLOCK), min(keys, _LONGEST_RANGES_BLOCK)


def _large_block(operands):
    """Queries of a group's heads and keys of a block that lies in no cache.

    It has few logits for memory's sake, and else as many as may be: each turn of a loop costs, and
    larger products run at a higher rate. Where T is short, keys take what queries leave.
    """
    B, M, G, T, _ = operands.query.shape
    if not all(isinstance(n, int) for n in (B, M, G, T)):
        return FORWARD_BLOCK
    logits = max(BLOCK_LOGITS // max(B * M * G, 1), 1)  # of a head
    side = 2 ** int(math.log2(logits) / 2)
    queries = max(min(side, T), 1)
    keys = 2 ** int(math.log2(max(logits // queries, 1)))
    return G * max(queries, _LEAST_BLOCK), max(keys, _LEAST_BLOCK)


def _block(grid, operands, masking, i, j):
    """Operands and places of block (i, j), from those of the queries of i."""
    operands, masking = grid.cut_keys(operands, masking, j)
    return operands, (masking, *grid.places(i, j))


def _scores(options, grid, operands, places, j):
    """Of a block of the keys of j, its operands and places."""
    masking, rows, columns = places
    sees = visible_in(options, grid, places, j)
    z = dropout_mask(options, masking, rows[0], columns[0], rows.size, columns.size)
    return score(options, operands, places, sees, z)


# ------------------------------------------------------------------------- forward and backward


def _forward_blocks(options, operands, masking, head=None):
    grid = _grid(operands, _longest_block(FORWARD_BLOCK, operands, masking, head), head)
    if head is None:
        masking = with_block_map(options, grid, masking)
    visits = blocks_to_visit(options, grid, masking)

    def query_block(results, i):
        of_i, masking_i = grid.cut_queries(operands, masking, i)

        def key_block(j, softmax):
            of_ij, places = _block(grid, of_i, masking_i, i, j)
            return softmax.update(_scores(options, grid, of_ij, places, j))

        start = Softmax.empty(of_i, grid.queries.block)
        block = visits(i).turns(key_block, start).finish()
        put = lambda x, block: grid.queries.put(x, block, i, 3)
        return jax.tree.map(put, results, block), None

    softmax = jax.eval_shape(lambda: Softmax.empty(operands, grid.queries.size))
    zeros = lambda x: jnp.zeros_like(operands.value, x.dtype, shape=x.shape)
    results = (zeros(softmax.weighted), zeros(softmax.peak))
    return lax.scan(query_block, results, grid.blocks())[0]


def _backward_blocks(options, operands, masking, kept, cotangents, shared, head=None):
    """dq, dk, dv, dscale, and `shared` grown by its part, in the accumulator's dtype.

    `shared` is the gradient of the bias and of what the score function closes over, which are of
    all heads; None where nobody asked.
    """
    grid = _grid(operands, _longest_block(BACKWARD_BLOCK, operands, masking, head), head)
    if head is None:
        masking = with_block_map(options, grid, masking)
    visits = blocks_to_visit(options, grid, masking)
    per_row = (*kept, *cotangents)

    def query_block(gradient, i):
        of_i, masking_i = grid.cut_queries(operands, masking, i)
        o, lse, do, dlse = (grid.queries.cut(x, i, 3) for x in per_row)
        delta = row_sums(do, o)
        first_time = grid.queries.first_time(i)
        if first_time is not None:
            lse = jnp.where(first_time[None, None, None], lse, -jnp.inf)

        def key_block(j, gradient):
            dq, dk, dv, dscale, dbias, darrays = gradient
            of_ij, places = _block(grid, of_i, masking_i, i, j)
            scores = _scores(options, grid, of_ij, places, j)
            added = block_gradient(options, of_ij, places, scores, lse, delta, do, dlse)
            dk = grid.keys.add(dk, added.key, j, 2)
            dv = grid.keys.add(dv, added.value, j, 2)
            if dscale is not None:
                dscale = dscale + added.scale
            if dbias is not None:
                ds = added.bias
                extent = [1 if n == 1 else m for n, m in zip(dbias.shape, ds.shape, strict=True)]
                dbias = grid.keys.add(dbias, sum_to(ds, extent), j, 4)
            if darrays is not None:
                add = lambda d, x: d + x.astype(d.dtype)
                darrays = jax.tree.map(add, darrays, added.score_arrays)
            return dq + added.query, dk, dv, dscale, dbias, darrays

        dq, dk, dv, dscale, (dbias, darrays) = gradient
        band = grid.band(dbias, i)
        start = (jnp.zeros_like(of_i.query, dq.dtype), dk, dv, dscale, band, darrays)
        block, dk, dv, dscale, band, darrays = visits(i).turns(key_block, start)
        dq = grid.queries.add(dq, block, i, 3)
        dbias = None if dbias is None else grid.put_band(dbias, band, i)
        return (dq, dk, dv, dscale, (dbias, darrays)), None

    q, k, v, scale, *_ = operands
    zeros = lambda x: jnp.zeros_like(x, kept[1].dtype)
    dscale = zeros(scale) if options.scale_gradient else None
    start = (zeros(q), zeros(k), zeros(v), dscale, shared)
    return lax.scan(query_block, start, grid.blocks())[0]


def _head(operands, masking, b, m):
    """Of one batch row and key/value head; what has queries and keys stays whole, see `Grid`."""
    row = lambda x: cut_one(x, b, 0)
    of_head = lambda x: None if x is None else cut_one(row(x), m, 1)
    apart = {
        "mask": masking.mask,
        "dropout_keys": of_head(masking.dropout_keys),
        "functions": _functions_of_head(masking.functions, b, m),
    }
    masking = jax.tree.map(row, masking._replace(**dict.fromkeys(apart)))
    shared = {"bias": operands.bias, "score_arrays": operands.score_arrays}
    operands = jax.tree.map(of_head, operands._replace(**dict.fromkeys(shared)))
    return operands._replace(**shared), masking._replace(**apart)


def _functions_of_head(functions, b, m):
    if functions is None:
        return None
    blocks = functions.blocks
    return functions._replace(
        rows=cut_one(functions.rows, b, 0),
        heads=cut_one(functions.heads, m, 0),
        blocks=None if blocks is None else cut_one(cut_one(blocks, b, 0), m, 1),
    )


def _with_block_map_of_heads(options, longest, operands, masking):
    """For head after head: found out once, for all that it does not depend on."""
    grid = _grid(operands, _longest_block(longest, operands, masking, True))
    return with_block_map(options, grid, masking)


def _scan_heads(run, operands, carry):
    """Scan `run(carry, (b, m))` over the batch rows and key/value heads."""
    B, M = operands.query.shape[:2]
    n = jnp.arange(B * M, dtype=jnp.int32)
    carry, results = lax.scan(run, carry, (n // M, n % M))
    return carry, jax.tree.map(lambda x: x.reshape(B, M, *x.shape[3:]), results)


def _forward_by_head(options, operands, masking):
    """One head after another, whose blocks stay in a CPU's cache."""
    masking = _with_block_map_of_heads(options, FORWARD_BLOCK, operands, masking)

    def run(_, head):
        of_head, masking_of_head = _head(operands, masking, *head)
        return None, _forward_blocks(options, of_head, masking_of_head, head)

    return _scan_heads(run, operands, None)[1]


def _backward_by_head(options, operands, masking, kept, cotangents, shared):
    masking = _with_block_map_of_heads(options, BACKWARD_BLOCK, operands, masking)

    def run(shared, head):
        of_head, masking_of_head = _head(operands, masking, *head)
        cut = lambda x: cut_one(cut_one(x, head[0], 0), head[1], 1)
        kept_of, cotangents_of = jax.tree.map(cut, (kept, cotangents))
        *gradient, shared = _backward_blocks(
            options, of_head, masking_of_head, kept_of, cotangents_of, shared, head
        )
        return shared, gradient

    shared, (dq, dk, dv, dscale) = _scan_heads(run, operands, shared)
    dscale = None if dscale is None else sum_to(dscale, operands.scale.shape)
    return dq, dk, dv, dscale, shared


# ------------------------------------------------------------------------ the rules of all orders


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward(options, operands, masking):
    """O and L, differentiable in every mode and to every order."""
    return lax.platform_dependent(
        operands,
        masking,
        cpu=partial(_forward_by_head, options),
        default=partial(_forward_blocks, options),
    )


@forward.defjvp
def _forward_jvp(options, primals, tangents):
    operands, masking = primals
    o, lse = forward(options, operands, masking)
    return (o, lse), _tangent(options, operands, masking, o, lse, tangents[0])


def _tangent(options, operands, masking, o, lse, doperands):
    """dO and dL, linear in `doperands`: no block's weights are kept, here or for the transpose."""
    # what the transpose adds up block by block is wide, too
    operands, doperands = jax.tree.map(lambda x: x.astype(lse.dtype), (operands, doperands))
    heads = o.shape[0] * o.shape[1]
    rows = int((_TANGENT_LOGITS / heads) ** 0.5) if isinstance(heads, int) else 0
    rows = max(rows, _LEAST_TANGENT_BLOCK)
    grid = _grid(operands, (rows, rows))
    masking = with_block_map(options, grid, masking)
    visits = blocks_to_visit(options, grid, masking)

    def query_block(_, i):
        of_i, masking_i = grid.cut_queries(operands, masking, i)
        dof_i, _ = grid.cut_queries(doperands, masking, i)
        o_i, lse_i = (grid.queries.cut(x, i, 3) for x in (o, lse))
        visits_of_i = visits(i)

        def visit(tangent, j):
            def scores_of(of_i):
                of_ij, places = _block(grid, of_i, masking_i, i, j)
                return _scores(options, grid, of_ij, places, j)

            scores, dscores = jax.jvp(scores_of, (of_i,), (dof_i,))
            added = block_tangent(scores, lse_i, dscores.s, dscores.value)
            return jax.tree.map(jnp.add, tangent, added)

        @partial(jax.checkpoint, prevent_cse=False)
        def key_block(tangent, j):
            skip = lambda tangent, _: tangent
            return lax.cond(visits_of_i.include(j), visit, skip, tangent, j), None

        start = (jnp.zeros_like(lse_i), jnp.zeros_like(o_i))
        blocks = jnp.arange(grid.keys.count, dtype=jnp.int32)
        sums, _ = lax.scan(key_block, start, blocks)
        return None, finish_tangent(o_i, lse_i, *sums, operands.sinks, doperands.sinks)

    # Checkpointed, and no array of all rows is carried: either would be kept for every block
    # where the transpose of this is differentiated in reverse.
    blocks = lax.scan(jax.checkpoint(query_block, prevent_cse=False), None, grid.blocks())[1]
    return jax.tree.map(lambda x: grid.queries.join(x, 3), blocks)


def gradient(options, operands, masking, o, lse, do, dlse):
    """The gradient of the operands, in the accumulator's dtype.

    O and L may be those of further keys as well, as in ring attention.
    """
    bias = operands.bias if options.bias_gradient else None
    arrays = operands.score_arrays if options.score_gradient else None
    dq, dk, dv, dscale, (dbias, darrays) = lax.platform_dependent(
        operands,
        masking,
        (o, lse),
        (do, dlse),
        jax.tree.map(lambda x: jnp.zeros_like(x, lse.dtype), (bias, arrays)),
        cpu=partial(_backward_by_head, options),
        default=partial(_backward_blocks, options),
    )
    dsinks = sinks_gradient(operands.sinks, lse, row_sums(do, o), dlse)
    return Operands(dq, dk, dv, dscale, dbias, dsinks, darrays)


backward = jax.custom_jvp(gradient, nondiff_argnums=(0,))


@backward.defjvp
def _backward_jvp(options, primals, tangents):
    """The derivative of the transpose of `_tangent`, which is the same function of the operands.

    O and L are functions of the operands too, those of these keys: what their tangents would add is
    already in it.
    """
    operands, masking, _, _, do, dlse = primals
    doperands, _, _, _, ddo, ddlse = tangents

    def transpose(operands, do, dlse):
        _, pullback = jax.vjp(lambda operands: forward(options, operands, masking), operands)
        return pullback((do, dlse))[0]

    arguments = (operands, do, dlse)
    d = backward(options, *primals)
    _, tangent = jax.jvp(transpose, arguments, (doperands, ddo, ddlse))
    tangent = tangent._replace(**{name: None for name, x in d._asdict().items() if x is None})
    return d, jax.tree.map(lambda t, x: t.astype(x.dtype), tangent, d)
