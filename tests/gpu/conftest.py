"""What the tests on a CUDA device share."""

from collections.abc import Iterator

import pytest

from esd_fast import ops


@pytest.fixture(params=["triton", "native", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one way to run the module's OP; skips with the reason where there is none, fails where it is wrong."""
    op = request.module.OP
    found = ops.ways(op, "cuda")[request.param]
    if found.missing:
        pytest.skip(found.missing)
    assert not found.wrong, found.wrong
    with ops.forced(request.param):
        assert ops.path_of(op, "cuda").name.startswith(request.param)
        yield request.param
