"""Which token ends a sequence, and what it says."""

import pytest

from jaxinfer.core.request import FinishReason
from jaxinfer.scheduler.stop import Stop, stop_conditions
from tests.scheduler.simulated_device import EOS, make_request

EOS_STOP = Stop(FinishReason.STOP)
LENGTH = Stop(FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("sampling", "token", "num_output", "expected"),
    [
        ({}, 5, 1, None),
        ({}, 5, 8, LENGTH),
        ({"ignore_eos": False}, EOS, 1, EOS_STOP),
        ({"ignore_eos": False}, EOS, 8, EOS_STOP),
        ({"ignore_eos": True}, EOS, 1, None),
        ({"ignore_eos": False, "min_tokens": 3}, EOS, 2, None),
        ({"ignore_eos": False, "min_tokens": 3}, EOS, 3, EOS_STOP),
        ({"stop_token_ids": [5, 6]}, 6, 1, Stop(FinishReason.STOP, 6)),
        ({"stop_token_ids": [5, 6], "min_tokens": 2}, 6, 1, None),
        ({"stop_token_ids": [5, 6]}, 7, 1, None),
        ({"stop_token_ids": [EOS], "ignore_eos": False}, EOS, 1, EOS_STOP),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, 1, Stop(FinishReason.STOP, EOS)),
        ({"min_tokens": 8}, 5, 8, LENGTH),
    ],
)
def test_stop(sampling, token, num_output, expected):
    conditions = stop_conditions(make_request("a", [1], max_tokens=8, **sampling))
    assert conditions.check(token, num_output) == expected


def test_the_context_may_leave_less_than_min_tokens():
    request = make_request("a", [1], max_tokens=8, min_tokens=8)
    request.max_tokens = 4  # what the context leaves
    assert stop_conditions(request).check(5, 4) == LENGTH
