"""The recurrent units beside the LSTM, each of a width with as many parameters.

    python benchmarks/units.py --rounds 5

The LSTM's time over that of the unit, forward and in training, as a user gets them: by kernels
where these serve; "on XLA" beside it is the LSTM's time there over the unit's there.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rnnattn
from benchmarks import timing

UNITS = (
    *("lstm", "gru", "gru_reset_before", "rnn", "layer_norm_lstm", "layer_norm_gru", "slstm"),
    *("mingru", "minlstm"),
)
OF_GRU = {"gru_reset_before": {"reset_after": False}}  # a name here is the GRU with these options
SHAPES = [(128, 32, 64, 128), (64, 64, 256, 256)]


def size(params):
    return sum(w.size for w in jax.tree.leaves(params))


def function(prefix, name):
    """That of a unit, with its options."""
    options = OF_GRU.get(name, {})
    return partial(getattr(rnnattn, prefix + ("gru" if options else name)), **options)


def params_like(name, D, count):
    """The weights of a unit that have about so many numbers."""
    init = function("init_", name)
    shapes = lambda H: jax.eval_shape(lambda key: init(key, D, H), jax.random.key(0))
    H = 8
    while size(shapes(H + 8)) <= count:
        H += 8
    return init(jax.random.key(0), D, H)


def programs(name, T, B, D, H, implementation):
    """By kind: "forward" and "training"."""
    params = params_like(name, D, size(rnnattn.init_lstm(jax.random.key(0), D, H)))
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    run = partial(function("", name), implementation=implementation)
    forward = lambda params, x: run(params, x)[0]
    loss = lambda params, x: jnp.sum(forward(params, x) ** 2)
    return {
        "forward": timing.compiled(forward, params, x),
        "training": timing.compiled(jax.grad(loss, (0, 1)), params, x),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=UNITS, default=list(UNITS))
    shape = partial(timing.counts, names="T,B,D,H")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES)
    parser.add_argument("--rounds", type=timing.count, default=5)
    args = parser.parse_args()
    for T, B, D, H in args.shapes:
        print(f"T {T}, B {B}, D {D}; an LSTM of H {H}")
        made = {
            name + label: programs(name, T, B, D, H, implementation)
            for name in dict.fromkeys(("lstm", *args.what))
            for label, implementation in (("", None), (" on XLA", "xla"))
        }
        for kind in ("forward", "training"):
            times = timing.measure({name: each[kind] for name, each in made.items()}, args.rounds)
            for name in args.what:
                here, on_xla = (
                    timing.ratio(times["lstm" + label], times[name + label]).median
                    for label in ("", " on XLA")
                )
                print(f"  {name:<16} {kind:<9} {here:5.2f}  on XLA {on_xla:5.2f}", flush=True)


if __name__ == "__main__":
    main()
