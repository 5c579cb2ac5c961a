"""Times behind a cold cache, by a made-up clock in place of a GPU's."""

from types import SimpleNamespace

import pytest
import torch

from stepmoe.measure import flush


def test_a_busy_stretch_of_the_host_is_not_a_difference(monkeypatch):
    """The host is slow for a third of the runs, and now and then for a single one."""
    found = SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    calls = []

    def seconds_of(run, device):
        run()
        timed = len(calls) - 2  # after one call of each that is not timed
        busy = 0.05 if timed <= 10 else 0.2 if timed % 9 == 0 else 0.01
        return busy + 0.003 * calls[-1]

    monkeypatch.setattr(flush, "seconds_of", seconds_of)
    timer = flush.Flush(torch.device("cpu"))
    difference = timer.median_difference(lambda: calls.append(2), lambda: calls.append(1))
    assert difference == pytest.approx(0.003)
    assert calls == [2, 1] * 16
    # One after the other, the same host makes a layer of 3 ms one of more than 30.
    calls[:] = []
    two, one = (timer.median(lambda count=count: calls.append(count)) for count in (2, 1))
    assert two - one > 0.03
