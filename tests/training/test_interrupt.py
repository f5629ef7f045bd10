from __future__ import annotations

import os
import signal

import pytest

from cache_pipeline.training.interrupt import StopRequest, stop_request


def signalled(request: StopRequest, times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_is_the_same_request_and_a_third_one_stops_at_once() -> None:
    with stop_request(alone=True) as request:
        assert request.signals == 0
        signalled(request, 2)
        assert request.signals == 2
        with pytest.raises(KeyboardInterrupt):
            signalled(request, 1)


@pytest.mark.parametrize(("alone", "agreed"), [(True, True), (False, False)])
def test_no_signal_cuts_off_a_save_or_one_of_several_processes(alone: bool, agreed: bool) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_request(alone=alone) as request:
        request.agreed = agreed
        signalled(request, 5)
    assert signal.getsignal(signal.SIGTERM) is before
