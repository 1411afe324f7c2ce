"""When a run is asked to write a checkpoint, and to stop."""

import signal
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType
from training.interruption import Request, Requests

from training import interruption


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set."""
    now = [1000.0]
    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), (AxisType.Auto,))


def test_a_checkpoint_is_due_every_so_many_minutes(clock, mesh):
    with Requests(mesh, checkpoint_minutes=2.0) as requests:
        due = []
        for seconds in (1, 60, 58, 2, 118, 3, 1000, 1):
            clock[0] += seconds
            due.append(requests.next().save)
    assert due == [False, False, False, True, False, True, True, False]


def test_zero_minutes_are_every_time(clock, mesh):
    with Requests(mesh, checkpoint_minutes=0.0) as requests:
        for _ in range(3):
            clock[0] += 0.1
            assert requests.next() == Request(True, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_kept_for_all_later_requests_and_only_while_entered(number, mesh):
    before = signal.getsignal(number)
    with Requests(mesh, checkpoint_minutes=1.0) as requests:
        assert requests.next() == (0, 0)
        signal.raise_signal(number)
        assert [requests.next().signal for _ in range(2)] == [number] * 2
    assert signal.getsignal(number) is before


def test_all_processes_get_the_largest_request_of_any(monkeypatch, mesh):
    """As with several processes, whose requests travel over the devices."""
    with Requests(mesh, checkpoint_minutes=1.0) as requests:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        assert jax.device_get(requests.next()).tolist() == [0, signal.SIGTERM]
