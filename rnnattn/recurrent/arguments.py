"""From the arguments of a sequence, checked, to what a schedule is given."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from rnnattn.checks import Check, several
from rnnattn.meshes import in_parts
from rnnattn.precision import varying_together
from rnnattn.recurrent.noise import QUIET, Noise, draw_reads, row_keys, step_keys
from rnnattn.recurrent.problem import Outputs, Steps
from rnnattn.recurrent.unit import full_state, types_of_step
from rnnattn.steps import batch_of, check_rows, check_step, check_steps, checked_masks

# What `residuals=None` may keep of all steps for the gradient.
_GATES_BYTES = 256 * 2**20  # the states and what the unit's steps give to keep
_STATES_BYTES = 2**30  # the states alone, but for y


class NoiseOptions(TypedDict, total=False):
    """What is random in the steps of any unit; see `rnnattn.lstm`."""

    zoneout: SupportsFloat | Sequence[SupportsFloat]
    recurrent_dropout: SupportsFloat
    candidate_dropout: SupportsFloat
    key: PRNGKeyArray | None


class _SharedOptions(NoiseOptions, total=False):
    lengths: Int[Array, "*B"] | None
    mask: Bool[Array, "..."] | None
    resets: Bool[Array, "..."] | None
    clip: SupportsFloat | None
    coupled: bool
    residuals: Literal["gates", "states"] | SupportsIndex | None
    implementation: Literal["xla", "native", "pallas", "cudnn"] | None


class StackOptions(_SharedOptions, total=False):
    """Options of `rnnattn.lstm` that a stack hands on to each of its layers."""

    reverse: bool


class SequenceOptions(_SharedOptions, total=False):
    """Options of `rnnattn.lstm` that both directions have in common."""

    time_major: bool


def time_first(x, batch, time_major):
    """(*B, T, …), or (T, *B, …), → (T, B, …)."""
    x = x if time_major else jnp.moveaxis(x, len(batch), 0)
    rows = x.shape[0], math.prod(batch)
    return x if len(batch) == 1 else x.reshape(*rows, *x.shape[1 + len(batch) :])


def time_back(y, batch, time_major):
    """(T, B, …) → (*B, T, …), or (T, *B, …)."""
    y = y if len(batch) == 1 else y.reshape(y.shape[0], *batch, *y.shape[2:])
    return y if time_major else jnp.moveaxis(y, 0, len(batch))


class Packing(NamedTuple):
    """The steps of each row that a mask lets through, moved before the others, in their order."""

    order: Array  # (T, B), where a step was
    places: Array  # (T, B), where it is

    @staticmethod
    def of(mask):
        """Of a mask (T, B)."""
        skipped = ~mask
        counted = lambda steps: jnp.cumsum(steps, axis=0, dtype=jnp.int32)
        behind = jnp.sum(mask, axis=0, dtype=jnp.int32)[None] + counted(skipped)
        order = jnp.argsort(skipped, axis=0, stable=True)
        return Packing(order, jnp.where(mask, counted(mask), behind) - 1)

    def pack(self, x):
        return _taken(x, self.order)

    def unpack(self, y):
        return _taken(y, self.places)

    def resets(self, resets):
        """The marks of the first packed steps of episodes, of which the first may be masked."""
        episodes = self.pack(jnp.cumsum(resets, axis=0, dtype=jnp.int32))
        return jnp.diff(episodes, axis=0, prepend=jnp.zeros_like(episodes[:1])) > 0


def _taken(x, steps):
    """Of an array (T, B, …), other steps of each row."""
    steps = jnp.expand_dims(steps, range(2, x.ndim))
    return jnp.take_along_axis(x, steps, axis=0, mode="promise_in_bounds")


def over_steps(run, options, time_major, params, x, state, lengths, mask, resets, keys):
    """What `run(params, state, steps)` gives, the outputs and the final state, as it was asked for.

    A masked row is run without the steps that hold its state, as one that is shorter.
    """
    given = (params, x, state, lengths, mask, resets, keys)
    params, x, state, lengths, mask, resets, keys = varying_together(given)
    batch = batch_of(x, time_major)
    first = lambda x: None if x is None else time_first(x, batch, time_major)
    x, mask, resets = map(first, (x, mask, resets))
    if mask is not None:
        if lengths is not None:
            mask = mask & _within(x, lengths)
        packing = Packing.of(mask)
        x = packing.pack(x)
        resets = None if resets is None else packing.resets(resets)
        lengths = jnp.sum(mask, axis=0, dtype=jnp.int32)
    steps = time_major_steps(x, lengths, resets, options.reverse)
    start = full_state(options.unit, params, state, math.prod(batch), x.dtype)
    if keys is not None:
        steps = with_noise(options.noise, steps, start, keys)
    outputs, final = run(params, start, steps)
    if mask is not None:
        outputs = jax.tree.map(packing.unpack, outputs)
    outputs = jax.tree.map(lambda y: time_back(y, batch, time_major), outputs)
    return outputs, as_given(final, state, batch)


def _within(x, lengths):
    """The steps of (T, B, …) within their row's length, (T, B)."""
    steps = jnp.arange(x.shape[0], dtype=jnp.int32)
    return steps[:, None] < lengths.astype(jnp.int32).reshape(1, -1)


def time_major_steps(x, lengths, resets, reverse):
    """The masks of a time-major x; a reset past a row's length counts for nothing."""
    valid = None if lengths is None else _within(x, lengths)
    if resets is None:
        return Steps(x, valid, None)
    if valid is not None:
        resets = resets & valid
    if reverse:  # the step run after an episode's first is the last of the episode before
        resets = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    return Steps(x, valid, resets)


def with_noise(noise, steps, state, rows):
    """The steps, with what is random in them drawn from the keys of rows, or to be drawn."""
    every_step = any(noise.zoneout) or noise.candidate_dropout > 0
    keys = step_keys(rows, steps.x.shape[0]) if every_step else None
    return steps._replace(keys=keys, reads=draw_reads(noise, rows, state[0].shape[-1]))


def as_given(final, state, batch):
    """The final state in the axes and dtypes of the initial one, so that a loop can carry it."""
    if len(batch) != 1:
        final = jax.tree.map(lambda x: x.reshape(*batch, x.shape[-1]), final)
    return final if state is None else jax.tree.map(lambda x, s: x.astype(s.dtype), final, state)


def on_mesh(function, run, options, time_major, given):
    """`run(given)`, the arguments of a sequence by name; with explicit axes, in parts of rows."""
    if len(batch_of(given["x"], time_major)) != 1:
        return run(given)
    steps = "TB" if time_major else "BT"
    widths = options.unit.widths(given["params"])
    letters = ["R"] + ["H"] * (len(widths) - 1)
    state = type(widths)(*("B" + letter for letter in letters))
    axes = {"params": "", "x": steps + "D", "state": state, "lengths": "B"}
    axes |= {"mask": steps, "resets": steps, "keys": "B"}
    rest = (*(steps + letter for letter in letters[1:]),) if options.every_state else None
    results: Any = (Outputs(steps + "R", rest), state)  # type: ignore[arg-type]
    whole = {"T": "time"}
    return in_parts(Check(function), run, given, axes, results, divided="B", whole=whole)


# ---- checks -----------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """Of a sequence, as arrays."""

    x: Array
    state: Any
    lengths: Array | None = None
    mask: Array | None = None
    resets: Array | None = None
    key: Any = None  # None draws nothing


def given_by_name(time_major, params, arguments):
    """What `on_mesh` and `over_steps` are given: a key for each row in place of the one."""
    given = {"params": params, **arguments._asdict()}
    key, rows = given.pop("key"), math.prod(batch_of(arguments.x, time_major))
    return given | {"keys": None if key is None else row_keys(key, rows)}


def checked_sequence(function, unit, params, x, state, lengths, mask, resets, time_major):
    """The arguments as arrays; `ValueError` for the first that is off."""
    check = Check(function)
    x = check.array("x", x)
    check_steps(check, "x", x, time_major)
    _check_params(check, unit, params, x)
    if state is not None:
        state = _checked_state(check, unit, params, state, batch_of(x, time_major), x)
    return Arguments(x, state, *checked_masks(check, x, lengths, mask, resets, time_major))


def checked_step(function, unit, params, x, state):
    """x and the state of a step as arrays; `ValueError` for the first that is off."""
    check = Check(function)
    x = check.array("x", x)
    check_step(check, "x", x)
    _check_params(check, unit, params, x)
    return x, _checked_state(check, unit, params, state, x.shape[:-1], x)


def checked_noise(
    function,
    unit,
    params,
    *,
    zoneout: Any = 0.0,
    recurrent_dropout: Any = 0.0,
    candidate_dropout: Any = 0.0,
    key: Any = None,
    **unknown: Any,
):
    """The rates of what has an effect, and the key where there is something to draw.

    Options that no unit has end here, too.
    """
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(unknown))!r}")
    check = Check(function)
    fields = unit.widths(params)._fields
    zoned = fields[: unit.zoned_fields]
    rates = tuple(zoneout) if several(zoneout) else len(zoned) * (zoneout,)
    expected = f"a number, or one for each of {', '.join(zoned)}"
    check(len(rates) == len(zoned), "zoneout", expected, zoneout)
    rates = tuple(check.share("zoneout", p) for p in rates) + (len(fields) - len(rates)) * (0.0,)
    recurrent = check.share("recurrent_dropout", recurrent_dropout)
    of_candidate = check.share("candidate_dropout", candidate_dropout)
    expected = "0 where a unit has no candidate beside its state"
    check(unit.candidate or of_candidate == 0, "candidate_dropout", expected, of_candidate)
    noise = Noise(rates if any(rates) else (), recurrent, of_candidate)
    if key is None:
        return Noise(noise.zoneout), None
    check.single_key("key", key)
    return noise, key if noise != QUIET else None


def checked_residuals(function, residuals):
    """A word, a number of steps, or None."""
    if residuals is None or (isinstance(residuals, str) and residuals in ("gates", "states")):
        return residuals
    expected = "'gates', 'states', a number of steps of at least 1 or None"
    return Check(function).integer("residuals", residuals, 1, expected)


def suited_residuals(unit, params, x, time_major):
    """What `residuals=None` keeps, by the memory it takes: see `lstm`. "states" of symbolic sizes.

    The numbers were measured: benchmarks/README.md, "What is kept for the gradient".
    """
    T, batch = x.shape[0 if time_major else -2], batch_of(x, time_major)
    if not all(isinstance(n, int) for n in (T, *batch)):
        return "states"
    (_, *rest), kept = types_of_step(unit, params, 1, x.dtype)
    bytes_of = lambda arrays: T * math.prod(batch) * sum(a.size * a.dtype.itemsize for a in arrays)
    if bytes_of([*rest, kept]) <= _GATES_BYTES:
        return "gates"
    return "states" if bytes_of(rest) <= _STATES_BYTES else math.isqrt(T)


def _check_params(check, unit, params, x):
    expected = "a NamedTuple of weights, as its `init_…` gives"
    check(hasattr(params, "_asdict"), "params", expected, type(params).__name__)
    unit.verify(check, params, x.shape[-1])
    for name, value in params._asdict().items():
        if value is not None:
            check.dtype_of(f"params.{name}", value, "x", x)


def _checked_state(check, unit, params, state, batch, x):
    widths = unit.widths(params)
    parts = len(state) if isinstance(state, tuple | list) else 0
    expected = f"a tuple ({', '.join(widths._fields)})"
    got = f"one of {parts}" if parts else type(state).__name__
    check(parts == len(widths), "state", expected, got)
    alone = len(widths) == 1  # then the state is called h, and is no tuple
    fields: list[Array] = []
    for field, s, width in zip(widths._fields, state, widths, strict=True):
        name = field if alone else f"state.{field}"
        s = check.array(name, s)
        if not fields:
            check.dtype_of(name, s, "x", x)
        letter = "H" if width == widths[-1] else "R"
        check_rows(check, name, s, (*batch, width), x, letter)
        fields.append(s)
    return type(widths)(*fields)
