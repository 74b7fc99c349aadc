"""Services that several modules of live tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import services


@pytest.fixture(scope="session")
def clients_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.PostgreSQL]:
    """For the tests of clients: each makes a database of its own in it (``tests.live.client.installation``)."""
    with services.postgresql(tmp_path_factory.mktemp("clients-pg")) as started:
        yield started
