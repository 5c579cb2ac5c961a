"""What carries a group's tensors, where it depends on the device."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers "fake")

from stepmoe.comm.groups import backend_for


@pytest.mark.parametrize(
    ("backend", "on_cpu", "on_gpu"),
    [("gloo", "gloo", "gloo"), ("cpu:gloo,cuda:fake", "gloo", "fake")],
)
def test_each_kind_of_device_has_its_own_backend(backend, on_cpu, on_gpu):
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for group in (None, dist.group.WORLD, dist.new_group([0])):
            assert backend_for(torch.device("cpu"), group) == on_cpu
            assert backend_for(torch.device("cuda", 0), group) == on_gpu
    finally:
        dist.destroy_process_group()
