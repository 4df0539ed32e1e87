"""One emulated GPU for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_emulator import Worker


@pytest.fixture(scope="session")
def gpu() -> Iterator[Worker]:
    """An H100 as the driver tells it, whose kernels run on the CPU and are watched."""
    with Worker(checked=True, compute_capability=(9, 0)) as worker:
        yield worker
