"""Our samplers pass the contract Optuna publishes for samplers of others.

Not its cases for relative sampling: they ask for values of a space made up in the test, and ours
know the parameters of their search space alone.
"""

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase

from kvsharer_exp.search.samplers import make_sampler
from tests.search.test_map_samplers import SPACE


class TestOurs(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=["evolution", "beam"])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: make_sampler(request.param, space=SPACE, seed=0)
