"""A sample of `tests/mutate.py`, which says what a mutant is; run that file for all of them.

In one test: what takes time is to set up the problems, once in a process.
"""

from tests.mutate import EQUIVALENT, FUNCTIONS, mutants, noticed, unchanged


def test_a_changed_sign_or_factor_is_noticed():
    found = mutants()
    assert set(EQUIVALENT) <= {(m.name, m.change) for m in found}
    for name in FUNCTIONS:
        assert noticed(unchanged(name)) is None, name
        own = [m for m in found if m.name == name and (name, m.change) not in EQUIVALENT]
        for mutant in (own[len(own) // 4], own[3 * len(own) // 4]):
            assert noticed(mutant), f"{mutant.place}: {mutant.change}"
