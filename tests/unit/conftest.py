"""No module of tests leaves its process group to the next."""

from __future__ import annotations

import pytest

from megatron_infimed.parallel import groups


@pytest.fixture(scope="module", autouse=True)
def groups_are_left():
    yield
    groups.shut_down()
