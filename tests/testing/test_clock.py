"""SimulatedClock: time moves when it is told to."""

from __future__ import annotations

import copy
import os
import pickle
import threading

import pytest

from samza_kinesis_io.clock import Clock
from samza_kinesis_io.testing import FakeKinesis, SimulatedClock


def test_it_is_a_clock() -> None:
    clock: Clock = SimulatedClock()
    assert clock.now_seconds() == 1_700_000_000.0


def test_time_stands_still_until_it_is_advanced() -> None:
    clock = SimulatedClock(100.0)
    before = clock.monotonic_seconds()
    assert clock.now_seconds() == clock.now_seconds() == 100.0
    clock.advance(1.5)
    assert clock.now_seconds() == 101.5
    assert clock.monotonic_seconds() - before == 1.5


def test_many_small_steps_make_one_large() -> None:
    clock = SimulatedClock()
    for _ in range(1000):
        clock.advance(0.1)
    assert clock.now_seconds() == 1_700_000_100.0


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="time cannot go back"):
        SimulatedClock().advance(-0.1)


def test_sleeping_and_waiting_move_the_time() -> None:
    clock = SimulatedClock(0.0)
    clock.sleep(2)
    clock.sleep(-1)
    condition = threading.Condition()
    with condition:
        clock.wait(condition, 3)
        clock.wait(condition, 0)
    assert clock.now_seconds() == 5.0


def test_without_autojump_a_sleeper_wakes_when_another_thread_has_advanced_far_enough() -> None:
    clock = SimulatedClock(0.0, autojump=False)
    woke: list[float] = []
    sleeper = threading.Thread(target=lambda: (clock.sleep(10), woke.append(clock.now_seconds())))
    sleeper.start()
    while sleeper.is_alive():
        clock.advance(1)
    # It fell asleep at an unknown moment, but slept its ten seconds.
    assert woke[0] >= 10


def test_without_autojump_a_wait_ends_at_its_time_or_with_a_notification() -> None:
    clock = SimulatedClock(0.0, autojump=False)
    condition = threading.Condition()
    waiting = threading.Semaphore(0)

    def wait(seconds: float) -> None:
        with condition:
            waiting.release()
            clock.wait(condition, seconds)

    for wake in (lambda: clock.advance(10), lambda: _notify(condition)):
        waiter = threading.Thread(target=wait, args=(10,))
        waiter.start()
        waiting.acquire()
        # The waiter holds the lock from its release of the semaphore until it waits: after this it does wait.
        with condition:
            pass
        clock.advance(9)
        assert waiter.is_alive()
        wake()
        waiter.join(10)
        assert not waiter.is_alive()


def _notify(condition: threading.Condition) -> None:
    with condition:
        condition.notify_all()


@pytest.mark.parametrize("made", [SimulatedClock(), FakeKinesis()], ids=["clock", "fake"])
def test_a_pickle_leads_back_to_the_same_object(made: object) -> None:
    assert pickle.loads(pickle.dumps(made)) is made
    assert copy.deepcopy(made) is made


def test_a_pickle_outlived_by_its_object_says_so() -> None:
    gone = pickle.dumps(SimulatedClock())
    with pytest.raises(LookupError, match="nobody holds it any more"):
        pickle.loads(gone)


def test_a_pickle_from_another_process_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a forked one, where a copy could be found that nobody else sees change."""
    clock = SimulatedClock()
    pickled, pid = pickle.dumps(clock), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(LookupError, match=f"pickled in process {pid} .* run LocalKinesis"):
        pickle.loads(pickled)
