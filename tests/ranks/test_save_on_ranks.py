"""Models saved from several ranks: what is written is what was read, to the last bit."""

import json
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle_fp8 import QUANTISED, multiplied_out
from safetensors.torch import load_file, save_file

import stepmoe as sm
from stepmoe import checkpoint_writer
from stepmoe.kernels.block_scale import BlockScaled
from stepmoe.model.merged import weight_views
from stepmoe.parallel import tensor_layouts
from stepmoe.published_config import publish

# A rank of 4 has 80 of 320 rows, or 136 of 544: blocks of 128 are shared by ranks. The 2 key-value
# heads are replicated.
CONFIG = (
    sm.Step3p5Config.tiny()
    .with_layers(0, 2)
    .replace(
        intermediate_size=320,
        share_expert_dim=320,
        moe_intermediate_size=544,
        torch_dtype="bfloat16",
    )
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the published FP8 layout, and its tensors.

    Numbers and scales are drawn apart, so that quantising anew would give others.
    """
    folder, tensors = tmp_path_factory.mktemp("published"), {}
    for name, layout in tensor_layouts(CONFIG, sm.ParallelConfig(), 0).items():
        shape = layout.shape
        if name.split(".")[-2] in QUANTISED:
            signs = torch.randint(2, shape, dtype=torch.uint8) * 128
            numbers = torch.randint(127, shape, dtype=torch.uint8)  # 127 would be NaN
            tensors[name] = (signs + numbers).view(torch.float8_e4m3fn)
            blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
            tensors[f"{name}_scale_inv"] = (torch.rand(blocks) + 0.5) * 1e-3
        else:
            is_bias = name.endswith("router_bias")  # which models hold in float32
            tensors[name] = torch.randn(shape, dtype=torch.float32 if is_bias else torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(publish(CONFIG)))
    return folder, tensors


def read_and_save(source, target, parallel, quantization, file_bytes):
    """In every rank; returns the names that this rank can read at once after."""
    model = sm.Step3p5ForCausalLM.from_pretrained(
        source, parallel=parallel, device="cpu", quantization=quantization
    )
    with mock.patch.object(checkpoint_writer, "_FILE_BYTES", file_bytes):
        checkpoint_writer.save_pretrained(model, target)
    return sorted(name for file in target.glob("*.safetensors") for name in load_file(file))


def read(folder):
    """Every tensor's dtype, shape and bytes."""
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    return {n: (t.dtype, t.shape, t.view(torch.uint8)) for n, t in tensors.items()}


def expect_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        assert found[name][:2] == (dtype, shape), name
        assert torch.equal(found[name][2], content), name


@pytest.mark.parametrize(
    ("tp", "ep", "attention", "file_bytes"),
    [
        (4, 2, "tp", 10**9),
        (4, 1, "tp", 200_000),  # several files
        (2, 2, "tp", 10**9),  # and two replicas
        (4, 4, "dp", 10**9),
    ],
)
def test_fp8_weights_are_written_as_they_were_read(
    ranks4, published, tmp_path, tp, ep, attention, file_bytes
):
    folder, tensors = published
    parallel = sm.ParallelConfig(tp, ep, attention)
    seen = ranks4.run(read_and_save, folder, tmp_path, parallel, "fp8", file_bytes)
    assert seen == [sorted(tensors)] * 4  # no rank returns before all is written
    expect_equal(read(tmp_path), read(folder))
    assert (tmp_path / "model.safetensors.index.json").exists() == (file_bytes < 10**9)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    # One tensor may be larger than a file shall be; scales and headers come on top.
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert max(sizes) < max(file_bytes, largest) * 1.2
    again = sm.ParallelConfig(4, 1, simulate_rank=2)
    for quantization in ("fp8", None):  # kept, and multiplied out
        views = {}
        for path in (folder, tmp_path):
            model = sm.Step3p5ForCausalLM.from_pretrained(
                path, parallel=again, dtype=torch.float32, quantization=quantization
            )
            views[path] = weight_views(model)
        for name, view in views[tmp_path].items():
            layout, exact = tensor_layouts(CONFIG, again, 2)[name], tensors[name].double()
            if f"{name}_scale_inv" in tensors:
                exact = multiplied_out(tensors[name], tensors[f"{name}_scale_inv"])
            if isinstance(view, BlockScaled):
                view = view.multiplied_out(torch.float64)  # exact: 4 bits times 24 bits
            assert torch.equal(view, exact[layout.slices].to(view.dtype)), name


def test_what_is_multiplied_out_is_written_so(ranks4, published, tmp_path):
    """And read again by one rank, it is what one rank multiplies out."""
    folder, _ = published
    parallel = sm.ParallelConfig(4, 2)
    ranks4.run(read_and_save, folder, tmp_path, parallel, None, 10**9)
    found = sm.Step3p5ForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in sm.Step3p5ForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(found[name], weight), name
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def read_late_and_save(folder):
    """In every rank: the first one is there long before the others have read."""
    parallel = sm.ParallelConfig(2, 2)
    time.sleep(0.5 * dist.get_rank())
    model = sm.Step3p5ForCausalLM.from_pretrained(folder, parallel=parallel, device="cpu")
    checkpoint_writer.save_pretrained(model, folder)


def test_a_model_can_be_saved_where_it_was_read(ranks4, published, tmp_path):
    """Nothing is taken away while a rank still reads it."""
    ranks4.run(read_and_save, published[0], tmp_path, sm.ParallelConfig(4, 2), None, 10**9)
    before = read(tmp_path)
    ranks4.run(read_late_and_save, tmp_path)
    expect_equal(read(tmp_path), before)


def save_a_changed_share(source, target, name, rows):
    """In every rank: the second one has other scales in these rows."""
    parallel = sm.ParallelConfig(4, 2)
    model = sm.Step3p5ForCausalLM.from_pretrained(
        source, parallel=parallel, device="cpu", quantization="fp8"
    )
    if model.comm.group.index == 1:
        weight_views(model)[name].scale[rows] *= 2
    checkpoint_writer.save_pretrained(model, target)


@pytest.mark.parametrize(
    ("part", "rows", "rank"),
    [
        ("share_expert.up_proj", slice(None), 0),  # the first rank finds that two ranks disagree
        ("share_expert.down_proj", slice(None), 0),
        ("share_expert.up_proj", slice(5, 6), 1),  # a rank disagrees with itself
    ],
)
def test_blocks_with_several_scales_are_refused_and_the_folder_is_left_as_it_was(
    ranks4, published, tmp_path, part, rows, rank
):
    folder, _ = published
    ranks4.run(read_and_save, folder, tmp_path, sm.ParallelConfig(4, 2), None, 200_000)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) > 3
    name = f"model.layers.1.{part}.weight"
    with pytest.raises(sm.RankError, match=f"{name} is held in FP8 with several scales") as error:
        ranks4.run(save_a_changed_share, folder, tmp_path, name, rows, timeout=60)
    assert error.value.rank == rank
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
