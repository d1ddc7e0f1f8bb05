"""Every architecture keeps the contract: found by walking `models/`, no list and no skip.

The normal run proves each architecture in one variant; -m "" runs every cell of the table.
"""

import pytest

from models import catalogue
from tests import contract, pages

CHECKS = {check.__name__: check for check in contract.CHECKS}
SELDOM = {"without_segments", "packing_bfloat16", "token_by_token_bfloat16"}


def _cells():
    """Every check of every variant; long ones: the slow checks, and variants of one file but one.

    The checks of a variant stay in one worker process: they share compiled programs. A mesh is for
    one file of each family: that kernels split is proven beside them (tests/test_kernels.py).
    """
    seen = set()
    for name, config in catalogue.cases().items():
        file, family = name.partition(":")[0], name.partition(".")[0]
        for title, check in CHECKS.items():
            marks = [pytest.mark.xdist_group(name)]
            split = title == "sharded" and family in seen
            if file in seen or split or title in SELDOM:
                marks.append(pytest.mark.long)
            yield pytest.param(config, check, id=f"{name}-{title}", marks=marks)
        seen |= {file, family}


HEAD = """# Conformance

Written by `pytest tests/test_contract.py -m "" -n 2 --page=conformance` from checks that passed.
Rows are the variants that `models/` names (`python -m models` says what they are), columns the
checks of `tests/contract.py`, which also says what each one proves. A number is the largest
relative RMS error of the check's comparisons: outputs, states, gradients of inputs and parameters
(allowed: 2e-5 in float32, 1e-2 in bfloat16). "ok" marks a check without a number, and "refuses" an
encoder that refuses a state in one line, as it must.

"""


@pytest.mark.parametrize(("config", "check"), list(_cells()))
def test_contract(config, check, record_property):
    contract.ERRORS.clear()
    seen = check(config)
    number = f"{max(contract.ERRORS):.0e}" if contract.ERRORS else "ok"
    record_property("cells", [seen or number])


def page():
    """Of docs/conformance.md: the test, the ids that it needs, its cells, and what writes it."""
    variants = list(catalogue.cases())
    wanted = [f"{variant}-{check}" for variant in variants for check in CHECKS]
    head, *rows = pages.read("conformance") or [[]]
    found = {
        f"{row[0]}-{check}": [cell]
        for row in rows
        for check, cell in zip(head[1:], row[1:], strict=True)
    }

    def write(found):
        rows = [[v, *(found.get(f"{v}-{check}", [""])[0] for check in CHECKS)] for v in variants]
        files = len(catalogue.architectures())
        end = f"\n{len(rows)} variants of {files} architectures.\n"
        return HEAD + pages.table(["variant", *CHECKS], rows) + end

    return "test_contract", wanted, found, write


def test_the_page_has_a_full_row_for_every_variant():
    head, *rows = pages.read("conformance")
    assert head == ["variant", *CHECKS]
    assert [row[0] for row in rows] == list(catalogue.cases())
    assert all(len(row) == len(head) and all(row) for row in rows)
