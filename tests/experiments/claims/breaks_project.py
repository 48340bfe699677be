"""Changes that the claims of this project, X1 and on, have to notice."""

import rnnattn.reference
from tests.experiments.claims.breaks import Break
from tests.experiments.claims.breaks_lstm import SLOPES, without_carry

BREAKS = (
    Break("X2", SLOPES, without_carry),
    Break("X3", "rnnattn.lstm", rnnattn.reference.lstm),
)
