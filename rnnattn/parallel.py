"""Attention to a sequence that lies on several devices: `ring_attention`, and orders for it.

How keys and values travel, and what is computed where: `rnnattn.attention.ring`, and for the other
method, which exchanges heads for time, `rnnattn.attention.ulysses`.

Axes: B batch, T queries, S keys, N query heads, M key/value heads, K head width, V value width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Required, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real, Shaped

import rnnattn.attention.api as api
from rnnattn.attention.arguments import (
    Arrays,
    Request,
    broadcasts,
    checked,
    numbered,
    sorted_arguments,
    with_functions,
)
from rnnattn.attention.dropout import dropout_keys
from rnnattn.attention.ring import IN_ORDER, attend_to_parts, ring_of, stops_of, zigzag_order
from rnnattn.attention.rule import attend
from rnnattn.attention.signature import Window
from rnnattn.attention.ulysses import attend_by_heads
from rnnattn.checks import Check


class RingOptions(TypedDict, total=False):
    """The options of `ring_attention`, for type checkers, but for what it returns."""

    axis_name: Required[str]
    mesh: Mesh | AbstractMesh | None
    batch_axis_name: str | Sequence[str] | None
    head_axis_name: str | Sequence[str] | None
    layout: Literal["contiguous", "zigzag"]
    method: Literal["ring", "ulysses"] | None
    bias: Real[Array, "..."] | None
    mask: Bool[Array, "..."] | None
    scale: float | Float[Array, "..."] | None
    is_causal: bool
    query_seq_lengths: Int[Array, " B"] | None
    key_value_seq_lengths: Int[Array, " B"] | None
    local_window_size: Window | None
    query_segment_ids: Int[Array, "B T"] | None
    key_value_segment_ids: Int[Array, "B S"] | None
    logits_soft_cap: float | None
    sinks: Float[Array, " N"] | None
    mask_function: Callable[..., Any] | None
    score_function: Callable[..., Any] | None
    dropout_rate: float
    dropout_key: PRNGKeyArray | None


@overload
def ring_attention(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B S M K"],
    value: Float[Array, "B S M V"],
    *,
    return_residual: Literal[False] = False,
    **options: Unpack[RingOptions],
) -> Float[Array, "B T N V"]: ...


@overload
def ring_attention(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B S M K"],
    value: Float[Array, "B S M V"],
    *,
    return_residual: Literal[True],
    **options: Unpack[RingOptions],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]: ...


@overload
def ring_attention(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B S M K"],
    value: Float[Array, "B S M V"],
    *,
    return_residual: bool = False,
    **options: Unpack[RingOptions],
) -> Any: ...


def ring_attention(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B S M K"],
    value: Float[Array, "B S M V"],
    *,
    axis_name: str,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis_name: str | Sequence[str] | None = None,
    head_axis_name: str | Sequence[str] | None = None,
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    method: Literal["ring", "ulysses"] | None = None,
    bias: Real[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    scale: float | Float[Array, "..."] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: Window | None = None,
    return_residual: bool = False,
    query_segment_ids: Int[Array, "B T"] | None = None,
    key_value_segment_ids: Int[Array, "B S"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    mask_function: Callable[..., Any] | None = None,
    score_function: Callable[..., Any] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Any:
    """`rnnattn.dot_product_attention` with T and S spread over the devices of a mesh axis.

    Within `jax.shard_map` over that axis, arrays are a device's parts, and so is the result.
    Outside, shapes are those of the whole, and each device still only ever holds its part. Lengths
    are always of the whole. Memory for each device falls as 1/D, and so does its work.

    Args:
        query, key, value: as there. They are best placed by
            `NamedSharding(mesh, P(batch_axis_name, axis_name, head_axis_name))`, the segment ids by
            the first two of these; on a mesh of `Explicit` axes they have to be.
        axis_name: the axis of the mesh that T and S are cut along, into D parts.
        mesh: of devices, from `jax.make_mesh`; None for that of `jax.set_mesh`, and within
            `jax.shard_map`.
        batch_axis_name, head_axis_name: the axes, if any, that B and the heads are cut along; None
            within `jax.shard_map`, which has cut them.
        layout: "contiguous", part i of the sequence lies on device i; or "zigzag", it was reordered
            by `rnnattn.parallel.zigzag` with its positions and segment ids, and so is the result.
            Under `is_causal` the former is brought into the latter and back, for the work to be
            balanced, by moving q, k, v and the result once; with many layers it is cheaper to
            reorder the tokens instead. A window to the left balances the work as it is, and then
            nothing is moved.
        method: "ring", keys and values travel; or "ulysses", heads change places with time, for
            which D has to divide N: each device then has all of T and S for N/D heads. That serves
            derivatives of every order, and sends less where there are as many heads of keys as of
            queries, but sends a bias and a mask as well, and gathers those that heads share. None
            is "ring".
        bias, mask: (B, N, T, S), or what broadcasts to that. Within `jax.shard_map` T is that of
            the part, S of the whole. For a device they are best cut along T, as a query is. With
            `layout="zigzag"` they are reordered along T and along S, as queries and keys are.
        local_window_size: as there. Keys go no further round than the window makes them.
        mask_function, score_function: as there, of rows, heads and positions of the whole; None
            within `jax.shard_map`.
        sinks, dropout_rate, dropout_key: as there; what is dropped is the same on any number of
            devices, but within `jax.shard_map`, where rows are counted from the first of the part.
        scale, is_causal, query_seq_lengths, key_value_seq_lengths, return_residual,
            query_segment_ids, key_value_segment_ids, logits_soft_cap: as there.
    Returns:
        The output (B, T, N, V), placed as the query should be, and L (B, T, N) after it with
        `return_residual`. 16-bit inputs are summed and merged in float32.
    Raises:
        ValueError: a shape, dtype or option is off, the mesh has no such axis, or its devices do
            not divide what is cut along it (twice the devices, where a device takes two chunks);
            the message says which, what was expected and what came.
    Gradient:
        With respect to query, key, value, bias, sinks, an array `scale` and what a score function
        closes over, from cotangents of the output and L. Kept are each device's part of these and
        of the output and L; round a ring the weights are computed again while keys and values go
        round once more, their gradients behind them. `jax.jvp` of this gradient works, and so do
        Hessian-vector products of that kind; reverse mode over it is refused by JAX for a ring, and
        so is `jax.jvp` of the function itself.
    Example:
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",))
        >>> q = jax.device_put(jnp.ones((2, 16, 4, 8)), NamedSharding(mesh, P(None, "sequence")))
        >>> out = ring_attention(q, q, q, mesh=mesh, axis_name="sequence", is_causal=True)
        >>> out.shape, out.sharding.spec[1]
        ((2, 16, 4, 8), 'sequence')
    """
    check = Check("ring_attention")
    arguments = sorted_arguments(
        check.function,
        query,
        key,
        value,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        mask_function=mask_function,
        score_function=score_function,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )
    arrays, options = checked(check.function, *arguments)
    for argument, x in (("query", arrays.query), ("key", arrays.key)):
        check(x.ndim == 4 and x.size > 0, argument, "of four axes, none of them empty", x.shape)
    within = axis_name in jax.sharding.get_abstract_mesh().manual_axes
    for argument, function in {"mask": mask_function, "score": score_function}.items():
        outside = function is None or not within
        check(outside, f"{argument}_function", "None within `jax.shard_map`", "one that is given")
    of_documents = arrays.query_segment_ids is None
    arrays, options = with_functions(check.function, arrays, options)
    of_documents &= arrays.query_segment_ids is not None
    of_logits = {"bias": bias, "mask": mask}
    check.one_of("method", method, (None, "ring", "ulysses"))
    by_heads = method == "ulysses"
    if within:
        outside = (mesh, batch_axis_name, head_axis_name) != (None, None, None)
        expected = "None within `jax.shard_map`"
        names = "mesh, batch_axis_name, head_axis_name"
        check(not outside, names, expected, "one that is given")
        devices = lax.axis_size(axis_name)
        arrays = _with_keys(options, _with_logits(check, arrays, of_logits, devices))
        if by_heads:
            _check_heads(check, arrays, layout, devices)
            out, lse = _attend_by_heads(axis_name, devices, options, arrays)
            return (out, lse) if return_residual else out
        ring, exchanged = ring_of(axis_name, devices, layout, options)
        _check_parts(check, arrays, layout, ring)
        T, S = (x.shape[1] * ring.devices for x in (arrays.query, arrays.key))
        ring = ring._replace(stops=stops_of(ring, options, T, S))
        out, lse = attend_to_parts(ring, exchanged, options, arrays)
        return (out, lse) if return_residual else out
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = _Axes(_axis_names(batch_axis_name), (axis_name,), _axis_names(head_axis_name))
    _check_mesh(check, mesh, axes)
    arrays = _with_logits(check, arrays, of_logits, 1)
    ring, exchanged = ring_of(axis_name, mesh.shape[axis_name], layout, options)
    if by_heads:
        ring, exchanged = ring._replace(chunks=1), False
    _check_division(check, arrays, mesh, axes, layout, ring)
    if of_documents:
        arrays = _in_place(mesh, axes, layout, arrays)
    if by_heads:
        divided = math.prod(mesh.shape[name] for name in axes.heads)
        _check_heads(check, arrays, layout, ring.devices, divided)
        out, lse = _run_by_heads(mesh, axes, options, arrays)
    else:
        out, lse = _run_ring(mesh, axes, ring, exchanged, options, arrays)
    return (out, lse) if return_residual else out


def zigzag(x: Shaped[Array, "..."], devices: int, *, axis: int = 1) -> Shaped[Array, "..."]:
    """Reorder an axis for `ring_attention(…, layout="zigzag")`: chunks 0, 2D−1, 1, 2D−2, …

    For whatever has a place in the sequence: tokens and targets, positions, segment ids.

    Args:
        devices: D, along which the axis is cut or will be.
    Raises:
        ValueError: the axis cannot be cut into 2D chunks.
    Example:
        >>> zigzag(jnp.arange(8), 2, axis=0).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _reorder("zigzag", x, devices, axis, zigzag_order(devices).reshape(-1))


def unzigzag(x: Shaped[Array, "..."], devices: int, *, axis: int = 1) -> Shaped[Array, "..."]:
    """Bring back into the order of the sequence what `zigzag` reordered.

    Raises:
        ValueError: the axis cannot be cut into 2D chunks.
    Example:
        >>> unzigzag(zigzag(jnp.arange(8), 2, axis=0), 2, axis=0).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    order = np.argsort(zigzag_order(devices).reshape(-1))
    return _reorder("unzigzag", x, devices, axis, order)


def _reorder(function, x, devices, axis, order):
    x, check = jnp.asarray(x), Check(function)
    check(devices >= 1, "devices", "at least 1", devices)
    within = -x.ndim <= axis < x.ndim
    check(within, "axis", f"one of the {x.ndim} axes of `x`", axis)
    axis, size = axis % x.ndim, x.shape[axis]
    expected = f"of a size that {order.size} chunks divide along axis {axis}"
    check(size % order.size == 0, "x", expected, size)
    chunks = jnp.split(x, order.size, axis)
    return jnp.concatenate([chunks[n] for n in order], axis)


class _Axes(NamedTuple):
    """Of the mesh, for the axes of a query."""

    batch: tuple[str, ...]
    sequence: tuple[str, ...]
    heads: tuple[str, ...]


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_ring(mesh, axes, ring, exchanged, options, arrays):
    """O and L, in the layout of the arguments."""
    ring = ring._replace(stops=stops_of(ring, options, arrays.query.shape[1], arrays.key.shape[1]))
    run = partial(attend_to_parts, ring, exchanged, options)
    return _in_parts(mesh, axes, options, arrays, run)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_by_heads(mesh, axes, options, arrays):
    """The same, of arguments whose heads are exchanged."""
    (axis_name,) = axes.sequence
    run = partial(_attend_by_heads, axis_name, mesh.shape[axis_name], options)
    return _in_parts(mesh, axes, options, arrays, run)


def _attend_by_heads(axis_name, devices, options, arrays):
    request = Request(return_residual=True)
    run = lambda arrays: api.run("ring_attention", attend, arrays, options, request)
    return attend_by_heads(axis_name, devices, run, arrays)


def _in_parts(mesh, axes, options, arrays, run):
    """`run(arrays)`, O and L, of each device's part, which has numbers and keys of the whole."""
    arrays = numbered(options, _with_keys(options, arrays))
    given = arrays._replace(query_offset=None)._asdict().items()
    given = {name: x for name, x in given if x is not None}
    specs = {name: _spec(axes, name, x) for name, x in given.items()}
    if mesh.explicit_axes and "dropout_key" in given:  # which was made here, of one key for all
        place = NamedSharding(mesh, specs["dropout_key"])
        given["dropout_key"] = jax.sharding.reshard(given["dropout_key"], place)
    part = lambda given: run(Arrays(**given))
    rows = _spec(axes, "query", arrays.query)
    return jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows))(given)


def _in_place(mesh, axes, layout, arrays):
    """With segment ids, which a mask came down to, where the tokens are that have them."""
    devices = mesh.shape[axes.sequence[0]]
    names = "query_segment_ids", "key_value_segment_ids"
    ids = {name: getattr(arrays, name) for name in names}
    if layout == "zigzag":
        ids = {name: zigzag(x, devices) for name, x in ids.items()}
    if mesh.explicit_axes:
        place = lambda name, x: NamedSharding(mesh, _spec(axes, name, x))
        ids = {name: jax.sharding.reshard(x, place(name, x)) for name, x in ids.items()}
    return arrays._replace(**ids)


def _spec(axes, name, x):
    batch, sequence, heads = (names or None for names in axes)
    if name in IN_ORDER:
        return PartitionSpec(*(batch, sequence, heads)[: jnp.ndim(x)])
    if name in ("score_arrays", "function_arrays"):  # every device has all of them
        return jax.tree.map(lambda _: PartitionSpec(), x)
    if name in ("scale", "sinks", "heads"):
        return PartitionSpec(heads) if jnp.ndim(x) else PartitionSpec()
    if name in ("bias", "mask"):
        divided = [names if n > 1 else None for names, n in zip(axes, _sizes(x), strict=True)]
        of_batch, of_queries, of_heads = (names or None for names in divided)
        return PartitionSpec(*(of_batch, of_heads, of_queries, None)[4 - x.ndim :])
    return PartitionSpec(batch, heads) if name == "dropout_key" else PartitionSpec(batch)


def _sizes(x):
    """#B, #T, #N of a bias or a mask, in the order of the axes of a query."""
    B, N, T, _ = (1,) * (4 - x.ndim) + x.shape
    return B, T, N


def _with_keys(options, arrays):
    """With a key for each row and head, the same wherever they are."""
    if options.dropout_rate == 0:
        return arrays._replace(dropout_key=None)
    B, _, N, _ = arrays.query.shape
    return arrays._replace(dropout_key=dropout_keys(arrays.dropout_key, B, 1, N).reshape(B, N))


# ---- checks -----------------------------------------------------------------------------------


def _with_logits(check, arrays, of_logits, devices):
    """With bias and mask, of which a device has all S columns."""
    B, T, N, _ = arrays.query.shape
    S = arrays.key.shape[1] * devices
    for name, x in of_logits.items():
        if x is not None:
            x = jnp.asarray(x)
            expected = f"of a shape that broadcasts to (B, N, T, S) = {(B, N, T, S)}"
            check(broadcasts(x.shape, (B, N, T, S)), name, expected, x.shape)
            kinds = {"mask": check.booleans, "bias": check.floating}
            kinds[name](name, x)
            arrays = arrays._replace(**{name: x})
    return arrays


def _check_heads(check, arrays, layout, devices, divided=1):
    expected = "'contiguous' where heads are exchanged"
    check(layout == "contiguous", "layout", expected, repr(layout))
    N, parts = arrays.query.shape[2], devices * divided
    expected = f"of heads that {parts} devices divide, which exchange them"
    check(N % parts == 0, "query", expected, f"{N} heads")


def _check_mesh(check, mesh, axes):
    expected = "given, or set by `jax.set_mesh`"
    check(not mesh.empty, "mesh", expected, mesh)
    arguments = ("batch_axis_name", "axis_name", "head_axis_name")
    for n, (argument, names) in enumerate(zip(arguments, axes, strict=True)):
        expected = f"of the mesh's axes {mesh.axis_names}"
        check(all(name in mesh.axis_names for name in names), argument, expected, names)
        others = {name for names in axes[:n] for name in names}
        distinct = not others & set(names)
        check(distinct, argument, f"another than {tuple(sorted(others))}", names)


def _check_parts(check, arrays, layout, ring):
    check.one_of("layout", layout, ("contiguous", "zigzag"))
    for argument, x in (("query", arrays.query), ("key", arrays.key)):
        expected = f"of a size along axis 1 that {ring.chunks} chunks divide"
        check(x.shape[1] % ring.chunks == 0, argument, expected, x.shape[1])


def _check_division(check, arrays, mesh, axes, layout, ring):
    check.one_of("layout", layout, ("contiguous", "zigzag"))
    for argument, x in (("query", arrays.query), ("key", arrays.key)):
        chunks = (1, ring.chunks, 1)
        for what, n, names, each in zip("BTN", range(3), axes, chunks, strict=True):
            parts = each * math.prod(mesh.shape[name] for name in names)
            what = {"T": "S", "N": "M"}.get(what, what) if argument == "key" else what
            expected = f"of a {what} that the mesh cuts into {parts} equal parts"
            check(x.shape[n] % parts == 0, argument, expected, x.shape[n])


def _axis_names(name):
    return () if name is None else (name,) if isinstance(name, str) else tuple(name)
