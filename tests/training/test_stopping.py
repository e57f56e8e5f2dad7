from __future__ import annotations

import signal
import threading

import pytest

from fahooks.training.stopping import SIGNALS, Stop


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_request_is_noted_and_the_second_one_heeded_at_once(number: signal.Signals):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_than_the_main_one_leaves_the_signals_alone():
    found: list[object] = []

    def enter() -> None:
        with Stop():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
