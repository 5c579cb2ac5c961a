"""Ranks that tests share: starting them takes seconds."""

from collections.abc import Iterator

import pytest

from stepmoe.launch import Ranks


@pytest.fixture(scope="session")
def ranks4() -> Iterator[Ranks]:
    """Four CPU ranks. A process has one `Ranks`: a test that makes another needs a process."""
    with Ranks(4, device="cpu") as ranks:
        yield ranks
