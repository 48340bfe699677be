"""Changes that the claims of this project, X1 and on, have to notice."""

import jax.numpy as jnp

import rnnattn.reference
from tests.experiments.claims.breaks import Break
from tests.experiments.claims.breaks_lstm import SLOPES, lstm, without_carry

rope = rnnattn.rope


def _rope_at_rounded_positions(x, positions, **options):
    return rope(x, jnp.round(positions / 8) * 8, **options)


def _lstm_that_keeps_all(*args, residuals, **options):
    return lstm(*args, residuals="gates", **options)


BREAKS = (
    Break("X2", SLOPES, without_carry),
    Break("X3", "rnnattn.lstm", rnnattn.reference.lstm),
    Break("X4", "rnnattn.rope", _rope_at_rounded_positions),
    Break("X5", "rnnattn.lstm", _lstm_that_keeps_all),
)
