"""Tests that `check` blames nothing in correct runs of random models, a sample of check_random_models.py."""

import pytest
from check_random_models import alarms, check_number


@pytest.mark.parametrize("number", range(11))  # a model of each family
def test_nothing_is_blamed_in_a_random_model(number):
    run, result = check_number(3, number)
    assert alarms(result) == [], run
