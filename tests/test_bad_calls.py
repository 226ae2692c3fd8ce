"""Every bad call of the public API raises a clear error, and changes nothing."""

import os

import pytest

import bad_calls

ROUNDS = int(os.environ.get("BAD_CALLS_ROUNDS", "1"))


@pytest.mark.parametrize("row", bad_calls.ROWS)
def test_the_call_that_is_made_bad_is_valid(row):
    if row != "testing.check":  # which takes seconds
        bad_calls.call(row)


@pytest.mark.parametrize("row", bad_calls.ROWS)
def test_bad_calls_raise_errors_that_name_the_argument_and_change_nothing(row):
    assert bad_calls.findings_of(row, ROUNDS) == []
