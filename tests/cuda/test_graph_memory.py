"""What a CUDA graph writes into stays its own, whatever becomes of other graphs."""

import gc

import pytest
import torch

import stepmoe as sm

pytestmark = pytest.mark.cuda


@torch.no_grad()
def test_a_graph_keeps_its_workspace_when_another_graph_ends():
    """One rank's share of a published layer: with 32 tokens cuBLAS splits products, and writes the
    parts into a workspace. torch frees one that graphs share when the first of them ends."""
    shape = sm.Step3p5Config.flash().replace(vocab_size=1024).with_layers(5)
    parallel = sm.ParallelConfig(8, 4, simulate_rank=0)

    def make(seed):
        return sm.Step3p5ForCausalLM.from_config(
            shape, "deferred", parallel, torch.bfloat16, "cuda", seed=seed
        )

    ids = torch.randint(1024, (32, 7), device="cuda")
    first, second = make(1), make(2)
    tokens = first.generate(ids, 12)
    assert first.decode_graph is not None
    second.generate(ids, 12)
    del second
    gc.collect()
    torch.cuda.empty_cache()
    # Whoever writes into memory that was given back, writes into these, or into nothing at all.
    free = torch.cuda.mem_get_info()[0]
    others = [torch.full((2**23,), 7.0, device="cuda") for _ in range(min(64, free // 2**26))]
    again = first.generate(ids, 12)
    assert torch.equal(again, tokens)
    assert all(bool((other == 7.0).all()) for other in others)
