"""Every architecture keeps the contract: found by walking `models/`, no list and no skip."""

import pytest

from models import catalogue
from tests import contract


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in catalogue.cases()])
def test_contract(config, check):
    check(config)
