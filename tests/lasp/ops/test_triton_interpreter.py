"""The Triton kernels under Triton's interpreter: masks, packing, segments, strides, decays."""

import pytest

from tests.lasp.ops import interpreter
from tests.lasp.ops.triton_checks import GROUPS


@pytest.mark.parametrize(
    ("group", "case"),
    [pytest.param(group, case, id=case) for group, cases in GROUPS.items() for case in cases],
)
def test_matches_token_loop(group, case):
    error = interpreter.errors("tests.lasp.ops.triton_checks", group)[case]
    assert error is None, error
