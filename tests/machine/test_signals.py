"""machine/signals.py: the first signal is noted, the second stops at once, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sest.machine.signals import Interrupted, StopRequest, stop_requests


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_raised_where_the_work_is_saved(signum: int) -> None:
    before = signal.getsignal(signum)
    with stop_requests("Saved in x.") as stop:
        assert stop.signum == 0
        stop.check()
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted, match=r"^Saved in x\.$") as stopped:
            stop.check()
    assert stopped.value.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_signal_stops_at_once() -> None:
    def twice() -> None:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_are_put_back_after_an_error() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), stop_requests():
        raise ZeroDivisionError
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_in_another_thread_which_gets_no_signals_nobody_asks() -> None:
    found: list[StopRequest] = []

    def work() -> None:
        with stop_requests("Saved.") as stop:
            stop.check()
            found.append(stop)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert [stop.signum for stop in found] == [0] and signal.getsignal(signal.SIGINT) is before
