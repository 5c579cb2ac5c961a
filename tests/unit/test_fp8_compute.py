"""Products with weights that stay in FP8: against float64, and the error of quantised activations.

tests/unit/test_fp8_checkpoint.py judges which numbers a rank holds.
"""

import json

import pytest
import torch
from oracle_fp8 import multiplied_out, quantise, quantised_activations, scaled_mm

import stepmoe as sm
from stepmoe import fp8
from stepmoe.__main__ import main
from stepmoe.kernels.block_scale import BlockScaled, quantise_blocks, quantise_rows
from stepmoe.mini import path as mini_path
from stepmoe.model.fp8 import Fp8Linear
from stepmoe.model.merged import weight_views
from stepmoe.parallel import tensor_layouts


def tokens(rows, columns):
    """Activations of very different sizes, an outlier in one token, and a token of zeros."""
    x = torch.randn(rows, columns, dtype=torch.float64) * torch.logspace(-3, 3, rows)[:, None]
    x[rows // 2, columns // 2] = 1e5
    x[rows // 3] = 0
    return x


@pytest.mark.parametrize(("offset", "columns"), [(0, 384), (32, 160), (100, 129), (0, 5)])
def test_the_error_of_quantised_activations_is_bounded(offset, columns):
    x = tokens(7, columns)
    blocks = -(-(offset + columns) // 128)
    quantised = quantise_rows(x, offset, blocks)
    assert quantised.numbers.shape == (8, 128 * blocks)  # cuBLAS wants a multiple of 4 rows
    assert quantised.scale[:, :2].stride()[0] == 1  # and the scales of a block side by side
    found = quantised.multiplied_out(7, offset, columns, torch.float64)
    block = (torch.arange(columns) + offset) // 128
    scale = quantised.scale[:7, block].double()
    # e4m3 has 3 bits of mantissa: numbers lie 2^-3 of their power of two apart, half of that is
    # 2^-4. Below the smallest normal number, 2^-6 scales, they lie 2^-9 apart.
    bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    assert ((found - x).abs() <= bound * (1 + 1e-6)).all()  # the scale is rounded to float32
    assert found[2].eq(0).all()
    # The outlier costs its own 128 columns only: its scale is 1e5 / 448.
    outlier = columns // 2
    for other in (block != block[outlier]).nonzero().flatten():
        assert scale[3, other] < 1


CUTS = [  # rows and columns of a weight of 640 x 512: whole blocks, and slices that cut them
    (slice(0, 640), slice(0, 512)),
    (slice(128, 384), slice(128, 512)),
    (slice(160, 320), slice(0, 512)),  # a shared expert's gate at tp=8
    (slice(0, 640), slice(160, 320)),  # and its down
    (slice(37, 38), slice(1, 512)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", CUTS)
def test_a_product_is_that_of_the_numbers_it_stands_for(cut, dtype):
    numbers, scales = quantise(torch.randn(640, 512) * torch.rand(640, 1))
    layer = Fp8Linear({"down_proj": cut}, {})
    (_, target) = next(layer.part_views())
    fp8.keep(target, 0, numbers[cut], scales[fp8.scale_slices(cut)], cut)
    exact = multiplied_out(numbers, scales)[cut]
    assert torch.equal(target.multiplied_out(torch.float64), exact)

    x = tokens(13, exact.shape[1]).to(dtype)
    edges = [0, *range(128 - cut[1].start % 128, exact.shape[1], 128), exact.shape[1]]
    wide = x.to(torch.promote_types(dtype, torch.float32))
    expected = quantised_activations(wide, edges) @ exact.T
    found = layer(x.view(1, 13, -1))
    assert found.shape == (1, 13, exact.shape[0])
    assert found.dtype is dtype
    # A float32 sum of 512 products: each addition rounds by 2^-24 of the sum so far. And half a
    # spacing of bfloat16, 2^-8 of a result to which FP8 may have added 2^-4.
    size = x.double().abs() @ exact.abs().T
    step = 1e-13 if dtype is torch.float64 else 512 * 2**-24
    step += 2**-8 * (1 + 2**-4) if dtype is torch.bfloat16 else 0
    assert ((found[0].double() - expected).abs() <= size * step).all()
    # What FP8 costs: half a step of e4m3 relative to each activation, or to the smallest numbers.
    plain = x.double() @ exact.T
    smallest = x.double().abs().amax(1, keepdim=True) / 448 * 2**-10
    bound = (x.double().abs() * 2**-4 + smallest) @ exact.abs().T
    assert ((found[0].double() - plain).abs() <= bound * 1.001 + size * step).all()


@pytest.mark.parametrize("plain", [{}, {"g_proj": 12}])
@pytest.mark.parametrize("cut", CUTS)
def test_scaled_mm_is_handed_what_its_source_asks_for(cut, plain, monkeypatch):
    """The path of a Hopper GPU, with torch's function replaced by its documentation."""
    monkeypatch.setattr("stepmoe.kernels.fp8_linear.has_fp8_products", lambda device: True)
    monkeypatch.setattr("torch.nn.functional.scaled_mm", scaled_mm)
    numbers, scales = quantise(torch.randn(640, 512) * torch.rand(640, 1))
    layer = Fp8Linear({"down_proj": cut}, plain).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.data.zero_()
    views = dict(layer.part_views())
    fp8.keep(views["down_proj"], 0, numbers[cut], scales[fp8.scale_slices(cut)], cut)
    if plain:
        views["g_proj"].normal_()
    for rows in (1, 6, 8):
        x = tokens(rows, cut[1].stop - cut[1].start).float()
        found = layer(x)
        monkeypatch.setattr("stepmoe.kernels.fp8_linear.has_fp8_products", lambda device: False)
        expected = layer(x)
        monkeypatch.setattr("stepmoe.kernels.fp8_linear.has_fp8_products", lambda device: True)
        assert found.shape == expected.shape
        # float32 sums of the same numbers in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=expected.abs().max() * 1e-6)


def test_quantised_weights_are_the_judge_s():
    for shape in ((300, 130), (3, 128, 256), (1, 1)):
        weight = torch.randn(shape)
        numbers, scales = quantise_blocks(weight)
        expected = quantise(weight)
        assert torch.equal(numbers.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scales, expected[1])
    zeros, scales = quantise_blocks(torch.zeros(4, 4))
    assert zeros.float().eq(0).all()
    assert scales.isfinite().all()


def test_scales_have_the_layout_that_cublas_needs():
    """aten/src/ATen/native/cuda/ScaledBlas.cpp: see the table in kernels/fp8_linear.py."""
    by_block = Fp8Linear({"o_proj": (slice(256, 1024), slice(0, 640))}, {}).blocks
    assert by_block.grain == 128
    assert by_block.scale.t().shape == (8, 6)  # 5 blocks of columns, rounded up to 4
    assert by_block.scale.t().stride() == (1, 8)
    by_row = Fp8Linear({"up_proj": (slice(160, 320), slice(0, 640))}, {}).blocks
    assert by_row.grain == 1
    assert by_row.scale.shape == (160, 5)
    assert by_row.scale.stride() == (1, 160)
    assert Fp8Linear({"q_proj": (slice(0, 40), slice(0, 640))}, {}).blocks.weight.shape[0] == 48


def test_the_same_random_model_however_it_is_cut():
    config = sm.Step3p5Config.tiny().replace(share_expert_dim=320, intermediate_size=320)
    name = "model.layers.1.share_expert.{}_proj.weight"

    def views(parallel):
        model = sm.Step3p5ForCausalLM.from_config(
            config, parallel=parallel, on_device=True, quantization="fp8"
        )
        return {n: v for n, v in weight_views(model).items() if isinstance(v, BlockScaled)}

    whole = {n: view.multiplied_out(torch.float64) for n, view in views(None).items()}
    for rank in range(4):
        parallel = sm.ParallelConfig(4, 2, simulate_rank=rank)
        layouts = tensor_layouts(config, parallel, rank)
        for own, view in views(parallel).items():
            expected = whole[own][layouts[own].slices]
            assert torch.equal(view.multiplied_out(torch.float64), expected), own
    assert name.format("up") in whole
    assert "model.layers.1.self_attn.g_proj.weight" not in whole


def test_an_unknown_way_to_hold_weights_is_named():
    with pytest.raises(sm.ConfigError, match="quantization='int4' is not known: use 'fp8'"):
        sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), quantization="int4")


def test_the_prefill_command_names_what_computed(tmp_path, capsys):
    file = tmp_path / "x.json"
    words = f"prefill --model {mini_path()} --layers 0-1 --tp 4 --ep 2 --simulate-rank 1"
    words += f" --input-len 9 --prompts 2 --variants deferred --device cpu --json {file}"
    words += " --quantization fp8"
    assert main(words.split()) == 0
    assert "held in FP8" in capsys.readouterr().out
    kept = json.loads(file.read_text())
    reference = "reference: quantised alike, multiplied out, product in float32"
    assert kept["attrs"]["quantization"] == {
        "weights": "fp8",
        "linear": reference,
        "experts": reference,
    }
    assert "--quantization fp8" in kept["attrs"]["command"]


def test_fp8_weights_take_half_of_bfloat16_s_memory():
    """One rank's share of the published shape; on the meta device nothing is allocated."""
    parallel, size = sm.ParallelConfig(8, 4, simulate_rank=3), {}
    for quantization in (None, "fp8"):
        model = sm.Step3p5ForCausalLM(
            sm.Step3p5Config.flash(), "deferred", parallel, torch.bfloat16, quantization
        )
        size[quantization] = sum(
            parameter.numel()
            * (1 if "float8" in str(parameter.dtype) else 4 if name.endswith("_scale") else 2)
            for name, parameter in model.named_parameters()
        )
    assert 50e9 < size[None] < 52e9
    # Half, and embedding and head in bfloat16, scales, zeros around the shared expert's slices.
    assert 0.5 < size["fp8"] / size[None] < 0.53
