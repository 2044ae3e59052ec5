"""No test leaves to the next what belongs to the process: its group of processes, what is logged and where."""

from __future__ import annotations

import logging

import pytest

from megatron_infimed.parallel import groups


@pytest.fixture(scope="module", autouse=True)
def groups_are_left():
    yield
    groups.shut_down()


@pytest.fixture(autouse=True)
def logging_is_left():
    """A command sets logging up for its process, also where a test calls it within its own."""
    root, ours = logging.getLogger(), logging.getLogger("megatron_infimed")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
