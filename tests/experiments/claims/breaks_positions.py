"""Changes that P1 to P4 have to notice."""

import rnnattn
from tests.experiments.claims.breaks import Break

sinusoids, shift_matrix, rope = rnnattn.sinusoids, rnnattn.shift_matrix, rnnattn.rope


def _sinusoids_of_twice_the_base(*args, base=10_000.0, **options):
    return sinusoids(*args, base=2 * base, **options)


def _shift_the_other_way(offset, *args, **options):
    return shift_matrix(-offset, *args, **options)


def _rope_by_twice_the_angle(x, positions, **options):
    return rope(x, 2 * positions, **options)


def _rope_that_knows_no_way_back(x, positions, inverse=False, **options):
    return rope(x, positions, **options)


BREAKS = (
    Break("P1", "rnnattn.sinusoids", _sinusoids_of_twice_the_base),
    Break("P2", "rnnattn.shift_matrix", _shift_the_other_way),
    Break("P3", "rnnattn.sinusoids", _sinusoids_of_twice_the_base),
    Break("P4", "rnnattn.rope", _rope_by_twice_the_angle),
    Break("P4", "rnnattn.rope", _rope_that_knows_no_way_back),
)
