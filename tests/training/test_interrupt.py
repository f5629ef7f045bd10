from __future__ import annotations

import os
import signal

import pytest

from cache_pipeline.training.interrupt import StopWish, stop_wish


def signalled(wish: StopWish, times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_is_the_same_wish_and_a_third_one_stops_at_once() -> None:
    with stop_wish(alone=True) as wish:
        assert not wish.requested
        signalled(wish, 2)
        assert wish.requested
        with pytest.raises(KeyboardInterrupt):
            signalled(wish, 1)


@pytest.mark.parametrize(("alone", "heeded"), [(True, True), (False, False)])
def test_no_signal_cuts_off_a_save_or_one_of_several_processes(alone: bool, heeded: bool) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_wish(alone=alone) as wish:
        wish.heeded = heeded
        signalled(wish, 5)
    assert signal.getsignal(signal.SIGTERM) is before
