"""Weights in FP8 on an NVIDIA GPU: on Hopper cuBLAS and the Triton kernel, elsewhere the reference.

tests/unit/kernels/test_fp8_kernels.py runs both Triton kernels on small shapes, there as well.
"""

import pytest
import torch

import stepmoe as sm
from stepmoe import fp8
from stepmoe.kernels import fp8_grouped, fp8_linear
from stepmoe.kernels.block_scale import quantise_blocks
from stepmoe.kernels.fp8_linear import has_fp8_products
from stepmoe.kernels.permute import sort_by_expert
from stepmoe.measure.distance import relative_error
from stepmoe.model.experts import passes
from stepmoe.model.fp8 import Fp8ExpertWeights, Fp8Linear
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import draw_into

pytestmark = pytest.mark.cuda
FLASH, PARALLEL = sm.Step3p5Config.flash(), sm.ParallelConfig(8, 4, simulate_rank=3)
GPU = torch.device("cuda")


def zeroed(layer):
    """On the GPU, as models are filled: around a slice stand zeros."""
    layer = layer.to(GPU).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    return layer


def filled(layer, whole, cut):
    """A layer of one part with this cut of a quantised weight, and the numbers it stands for."""
    layer = zeroed(layer)
    numbers, scale = quantise_blocks(torch.randn(whole, device=GPU) / whole[-1] ** 0.5)
    _, target = next(layer.part_views())
    fp8.keep(target, 0, numbers[cut], scale[fp8.scale_slices(cut)], cut)
    return layer, target.multiplied_out(torch.float64)


def activations(rows, columns, dtype):
    x = torch.randn(rows, columns, device=GPU) * torch.logspace(-2, 2, rows, device=GPU)[:, None]
    x[rows // 2, columns // 3] = 1e3
    return x.to(dtype)


SHAPES = {  # of the published shape at tp=8, and slices that cut blocks
    "qkv": ((1280, 4096), (slice(0, 1280), slice(0, 4096))),
    "o_proj": ((4096, 8192), (slice(0, 4096), slice(1024, 2048))),
    "shared gate": ((1280, 4096), (slice(160, 320), slice(0, 4096))),
    "shared down": ((4096, 1280), (slice(0, 4096), slice(160, 320))),
    "six blocks": ((256, 768), (slice(0, 256), slice(0, 768))),
    "square": ((1024, 1024), (slice(0, 1024), slice(0, 1024))),  # where transposed scales fit too
    "few rows": ((40, 300), (slice(3, 40), slice(0, 300))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3, 64, 1021])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_quantised_numbers(shape, tokens, dtype):
    if not has_fp8_products(GPU):
        pytest.skip("needs a Hopper GPU and CUDA 12.9")
    whole, cut = SHAPES[shape]
    layer, exact = filled(Fp8Linear({"down_proj": cut}, {}), whole, cut)
    x = activations(tokens, exact.shape[1], dtype)
    weight = layer.blocks
    quantised = fp8_linear.quantise_rows(x, weight.offset, weight.num_blocks)
    stands_for = quantised.multiplied_out(tokens, weight.offset, weight.columns, torch.float64)
    # FP8 products are exact; the tensor cores add 128 of them in about 14 bits (source:
    # fp8_grouped_gpu.py) before the sum goes on in float32. bfloat16 rounds the result by 2^-9 on
    # average. By tests/oracle_fp8.py, transposed scales put "square" off by 8 to 10 %.
    limit = 2**-10 if dtype is torch.float32 else 2**-8
    assert relative_error(layer(x), stands_for @ exact.T) < limit
    # Half a step of e4m3 is 2^-4 at most, 2.6 % on average.
    assert relative_error(layer(x), x.double() @ exact.T) < 0.05


@pytest.mark.parametrize("tokens", [1, 64, 3000, 16384])
def test_experts_are_the_reference_s(tokens, monkeypatch):
    if not has_fp8_products(GPU):
        pytest.skip("needs a Hopper GPU and CUDA 12.9")
    up_cut = (slice(12, 24), slice(640, 1280), slice(0, 4096))
    up = zeroed(Fp8ExpertWeights({"gate_proj": up_cut, "up_proj": up_cut}))
    down_cut = (slice(12, 24), slice(0, 4096), slice(640, 1280))
    down = zeroed(Fp8ExpertWeights({"down_proj": down_cut}))
    layouts = tensor_layouts(FLASH.with_layers(4).replace(num_experts=48), PARALLEL, 3)
    for held in (up, down):
        for part, view in held.part_views():
            name = f"model.layers.0.moe.{part}.weight"
            draw_into(view, name, layouts[name], 0)
    x = activations(tokens, 4096, torch.bfloat16)
    ids = torch.rand(tokens, 48, device=GPU).topk(8, dim=-1).indices
    if not ((ids >= 12) & (ids < 24)).any():  # one token chooses none of these experts 1 time in 13
        ids[0, 0] = 12
    order = sort_by_expert(ids, 12, 12)

    def computed():
        starts = passes(order, 4)
        half = up.first_half(x, order, 7.0)
        return [down.second_half(half(start, starts.step), order, start) for start in starts]

    num_rows = int(order.ends[-1])
    found = torch.cat(computed())[:num_rows]
    with monkeypatch.context() as patched:
        patched.setattr(fp8_grouped, "_takes_kernel", lambda x: False)
        patched.setattr(fp8_grouped, "product_dtype", lambda device, dtype: torch.float32)
        wanted = torch.cat(computed())[:num_rows]
    # Between the halves both round to bfloat16 and to FP8: where they differ by a rounding of
    # bfloat16, an activation may fall to the next number of e4m3, 2^-3 away, but few do.
    assert relative_error(found, wanted) < 0.01


def test_a_simulated_rank_runs_without_waiting_and_says_what_ran():
    config = FLASH.with_layers(1, 4, 5).replace(num_experts=48)
    model = sm.Step3p5ForCausalLM.from_config(
        config, "fused", PARALLEL, torch.bfloat16, GPU, quantization="fp8"
    )
    ids = torch.randint(config.vocab_size, (2, 500), device=GPU)
    with sm.Ledger() as ledger:
        first = model(ids, last_only=True)
    assert first.isfinite().all()
    kernels = fp8.fp8_kernels(GPU, torch.bfloat16)
    assert all(name in str(ledger) for name in kernels.values())
    if has_fp8_products(GPU):
        assert kernels == {"linear": fp8_linear.SCALED_MM, "experts": fp8_grouped.GROUPED}
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = model(ids, last_only=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, again)
    held = {p.dtype for n, p in model.named_parameters() if "o_proj" in n and "scale" not in n}
    assert held == {torch.float8_e4m3fn}
