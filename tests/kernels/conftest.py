"""The instruction tiers on which kernels are tested: each module names its own in TIERS."""

from collections.abc import Iterator

import pytest

from rbe.kernels import cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tier" in metafunc.fixturenames:
        metafunc.parametrize("tier", metafunc.module.TIERS, indirect=True)


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels on one tier; the test is skipped where the processor lacks it."""
    if not cpu.tier_available(request.param):
        pytest.skip(f"this processor has no {request.param}")
    cpu.set_tier(request.param)
    yield request.param
    cpu.set_tier("")
