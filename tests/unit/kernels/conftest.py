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


@pytest.fixture(autouse=True)
def loops_of_computed_length(monkeypatch):
    """Let numpy 2.4 and Triton 3.6 agree: a scalar of the interpreter is an array of one entry,
    which `range` no longer takes for a number."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_further(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_further)
