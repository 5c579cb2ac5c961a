"""The rates of the GPU at hand: here of the CPU, in small."""

import torch

from stepmoe.measure import chip


def test_rates_of_a_moment_and_of_a_while(monkeypatch):
    small = {"_SIDE": 96, "_COPY": 2**20, "_SUSTAINED": 0.05}
    for name, value in small.items():
        monkeypatch.setattr(chip, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    begun, calls = [], []

    def seconds_of(run, device):  # a machine on which a product takes 1 ms, later 2, a copy 0.5
        begun.append(len(calls))
        run()
        products = len(calls) - begun[-1]
        if not products:
            return 5e-4
        return products * (1e-3 if len(begun) < 50 else 2e-3)

    monkeypatch.setattr(chip, "seconds_of", seconds_of)
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *two: calls.append(1) or multiply(*two))
    found = chip.measure_chip(torch.device("cpu"))
    assert found.rate == 2 * 96**3 / 1e-3
    assert found.bandwidth == 2 * 2**20 / 5e-4
    assert found.sustained_rate == 2 * 96**3 / 2e-3
    assert found.sustained().rate == found.sustained_rate
    assert len(calls) == 23 + 4 * round(0.05 / 4 / 1e-3)
