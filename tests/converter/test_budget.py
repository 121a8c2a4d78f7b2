"""The budget of bytes in flight alone: what threads hold of it, wait for, and are woken from."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from converter.engine import ByteBudget, CancelledError


def test_the_budget_is_never_exceeded() -> None:
    budget, held, most, lock = ByteBudget(100), 0, 0, threading.Lock()

    def worker(seed: int) -> None:
        nonlocal held, most
        for nbytes in np.random.default_rng(seed).integers(0, 101, 50).tolist():
            with budget.hold(nbytes):
                with lock:
                    held += nbytes
                    most = max(most, held)
                time.sleep(0.0001)
                with lock:
                    held -= nbytes

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert 50 < most <= 100
    assert held == 0


def test_more_than_the_limit_takes_all_of_it_and_waits_for_nobody() -> None:
    budget = ByteBudget(100)
    with budget.hold(1000), budget.hold(0):
        waiting = threading.Thread(target=lambda: budget.hold(1).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()  # nothing is left for it
    waiting.join(5)
    assert not waiting.is_alive()


def test_cancelling_wakes_all_who_wait_and_lets_nobody_in() -> None:
    budget, woken = ByteBudget(10), []

    def worker() -> None:
        try:
            with budget.hold(10):
                pass
        except CancelledError as error:
            woken.append(error)

    with budget.hold(10):
        threads = [threading.Thread(target=worker) for _ in range(5)]
        for thread in threads:
            thread.start()
        budget.cancel()
        for thread in threads:
            thread.join(5)
    assert len(woken) == 5
    with pytest.raises(CancelledError), budget.hold(0):
        pass
