"""Changes that the claims of this project, X1 and on, have to notice."""

import jax.numpy as jnp

import rnnattn.reference
from experiments.models.lstm_variants import back_propagate
from experiments.report.intervals import Mean
from tests.experiments.claims.breaks import Break
from tests.experiments.claims.breaks_lstm import SLOPES, lstm, without_carry

rope = rnnattn.rope


def _rope_at_rounded_positions(x, positions, **options):
    return rope(x, jnp.round(positions / 8) * 8, **options)


def _lstm_that_keeps_all(*args, residuals, **options):
    return lstm(*args, residuals="gates", **options)


def _half_as_wide(samples):
    mean = Mean.of_normal(samples)
    return mean._replace(error=mean.error / 2)


def _with_the_way_back(terms, case, steps):
    return back_propagate(terms._replace(carried_cell=True), case, steps)


BREAKS = (
    Break("X1", "experiments.claims.missing_terms.back_propagate", _with_the_way_back),
    Break("X2", SLOPES, without_carry),
    Break("X3", "rnnattn.lstm", rnnattn.reference.lstm),
    Break("X4", "rnnattn.rope", _rope_at_rounded_positions),
    Break("X5", "rnnattn.lstm", _lstm_that_keeps_all),
    Break("X6", "experiments.report.intervals.Mean.of", _half_as_wide),
)
