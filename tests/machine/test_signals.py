"""machine/signals.py: the first signal is noted, the second stops at once, and nothing is left behind."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sest.machine.signals import RESERVE, Interrupted, StopRequest, TimeLimit, stop_requests


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_is_over_when_a_piece_of_work_as_long_as_the_longest_and_saving_it_no_longer_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with stop_requests("Saved.", TimeLimit(100.0, began=990.0)) as stop:  # 10 s went into starting
        last = 990.0 + 100.0 * (1 - RESERVE) - 2 * 10.0
        for now in (*np.arange(1001.0, last, 10.0), last):
            assert stop.asked() == 0, now
        now = last + 0.1
        assert stop.asked() == signal.SIGALRM
        with pytest.raises(Interrupted, match=r"Saved\.") as stopped:
            stop.check()
    assert stopped.value.signum == signal.SIGALRM
    assert not TimeLimit(None, began=0.0).is_over()


def test_when_its_terminal_goes_away_a_process_still_saves(tmp_path: Path) -> None:
    """A shell that ends sends SIGHUP, and what is then written to the terminal is an error."""
    code = (
        "import time\nfrom sest.machine.signals import stop_requests\n"
        "with stop_requests('Saved.') as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.asked(): time.sleep(0.01)\n"
        "    print('the terminal is gone', flush=True)\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
    )
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)  # the kernel sends SIGHUP to what runs there
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (tmp_path / "saved").exists()
