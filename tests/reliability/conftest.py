"""Fixtures for the tests of reliability."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _old_handlers():
    """A preempted run goes on ignoring the signals that stopped it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
