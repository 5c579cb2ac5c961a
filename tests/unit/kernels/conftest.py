"""Kernels run on the GPU if there is one, else on the CPU in Triton's interpreter."""

import os

import pytest
import torch


@pytest.fixture
def device():
    """Where the tensors of a kernel live."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1 before triton is imported")
    return torch.device("cuda")
