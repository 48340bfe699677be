"""A sample of `tests/mutate.py`, which says what a mutant is; run that file for all of them.

One test for each set of problems: what takes time is to set them up, once in a process.
"""

import pytest

from tests.mutate import EQUIVALENT, FUNCTIONS, mutants, noticed, unchanged

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.mark.parametrize("problems", dict.fromkeys(FUNCTIONS.values()), ids=lambda f: f.__name__)
def test_a_changed_sign_or_factor_is_noticed(problems):
    functions = [function for function in FUNCTIONS if FUNCTIONS[function] is problems]
    assert noticed(*map(unchanged, functions)) is None
    for function in functions:
        found = [m for m in mutants() if m.function is function]
        found = [m for m in found if (m.name, m.change) not in EQUIVALENT]
        mutant = found[len(found) // 2]
        assert noticed(mutant), f"{mutant.place}: {mutant.change}"


def test_changes_listed_as_equivalent_exist():
    assert set(EQUIVALENT) <= {(m.name, m.change) for m in mutants()}
