"""A fixture of op tests that make their tensors where the backend wants them."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors are made on the device of the test's backend, unless told otherwise."""
    if "backend" not in request.fixturenames:
        yield
        return
    with request.getfixturevalue("device"):
        yield
