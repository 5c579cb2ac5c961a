"""What the tests of the fused kernels ask of a result, and need. Runs in the ranks, on the GPU."""

import torch


def larger_error(normed, total, exact, weight, eps):
    """The larger relative error of the norm and the residual; float64 `exact` is the residual."""
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    exact_normed = exact * scale * (1 + weight.double())
    pairs = ((normed, exact_normed), (total, exact))
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max()


def compile_flashinfer():
    """Have FlashInfer's module compiled and loaded.

    The first time takes minutes, and a call that is ended at its limit ends the compiler as well:
    the next one would begin again, and so on for ever.
    """
    from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

    get_trtllm_comm_module()


def fingerprint(*tensors):
    """A number that differs, all but surely, when any bit of the tensors does; on their device."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        bits = tensor.contiguous().view(torch.int16).flatten().long()
        total += (bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum()
    return total
