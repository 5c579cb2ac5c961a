"""FP8 weights as published: blocks, their scales, and slices that begin inside a block.

The judge multiplies every block out in float64, in a loop over blocks.
"""

import json
import threading
from pathlib import Path

import oracle
import pytest
import torch
from oracle_fp8 import QUANTISED, Weight, multiplied_out, quantise
from safetensors.torch import load_file, save_file

import stepmoe as sm
from stepmoe import fp8
from stepmoe.checkpoint import Checkpoint
from stepmoe.checkpoint_writer import save_pretrained
from stepmoe.kernels.block_scale import BlockScaled
from stepmoe.model.merged import weight_views
from stepmoe.parallel import tensor_layouts

# Uneven against blocks of 128, whole and cut in 4: 320 / 4 = 80 rows, 160 columns, 272 / 2 = 136.
CONFIG = sm.Step3p5Config.tiny().replace(
    hidden_size=160, intermediate_size=320, moe_intermediate_size=272, share_expert_dim=144
)
UP = "model.layers.2.moe.up_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as the FP8 checkpoint's, in three files with an index; and what it stands for."""
    folder = tmp_path_factory.mktemp("fp8")
    save_pretrained(sm.Step3p5ForCausalLM.from_config(CONFIG, dtype=torch.bfloat16), folder)
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        if name.split(".")[-2] in QUANTISED:
            stored, scales = quantise(tensors[name].float())
            tensors |= {name: stored, f"{name}_scale_inv": scales}
            exact[name] = multiplied_out(stored, scales)
        else:
            exact[name] = tensors[name].double()
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, exact


@pytest.mark.parametrize("piece", [2**24, 3000])  # whole, and cut again inside a rank's slice
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 2), (4, 1)])
def test_each_rank_s_slice_is_multiplied_out(published, monkeypatch, tp, ep, piece):
    folder, exact = published
    monkeypatch.setattr("stepmoe.checkpoint._PIECE", piece)
    checkpoint = Checkpoint(folder)
    inside = 0
    for rank in range(tp):
        for name, layout in tensor_layouts(CONFIG, sm.ParallelConfig(tp, ep), rank).items():
            part = torch.full(layout.local_shape, torch.nan)
            checkpoint.copy_into(part, name, layout)
            # float32: one product of two numbers, rounded once.
            torch.testing.assert_close(part.double(), exact[name][layout.slices], rtol=6e-8, atol=0)
            starts = [s.start % 128 for s in layout.slices[-2:]]
            inside += name.split(".")[-2] in QUANTISED and any(starts)
    assert tp == 1 or inside > 50, "the shape does not test slices that begin inside a block"


@pytest.mark.parametrize("piece", [2**24, 3000])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 2), (4, 1)])
def test_each_rank_s_slice_is_kept_as_it_is(published, monkeypatch, tp, ep, piece):
    folder, exact = published
    monkeypatch.setattr("stepmoe.checkpoint._PIECE", piece)
    kept = 0
    for rank in range(tp):
        parallel = sm.ParallelConfig(tp, ep, simulate_rank=rank)
        model = sm.Step3p5ForCausalLM.from_pretrained(
            folder, parallel=parallel, dtype=torch.float64, quantization="fp8"
        )
        layouts = tensor_layouts(CONFIG, parallel, rank)
        for name, view in weight_views(model).items():
            if isinstance(view, BlockScaled):
                numbers = view.multiplied_out(torch.float64)  # exact: 4 bits times 24 bits
                assert torch.equal(numbers, exact[name][layouts[name].slices]), name
                outside = view.weight.float()
                outside[..., view.offset : view.offset + view.columns] = 0
                assert outside.eq(0).all()
                kept += 1
            else:
                assert name.split(".")[-2] not in QUANTISED
    assert kept == tp * (5 * 4 + 3 + 4 * 6)  # q, k, v, o; the dense MLP; shared and routed experts


def test_the_model_that_keeps_them_is_the_oracle_s(published):
    """The judge quantises activations as well, so that only rounding in float64 is left."""
    folder, exact = published
    ids = torch.randint(256, (2, 7))
    model = sm.Step3p5ForCausalLM.from_pretrained(folder, dtype=torch.float64, quantization="fp8")
    with sm.Ledger() as ledger:
        logits = model(ids)
    weights = {n: Weight(w) if n.split(".")[-2] in QUANTISED else w for n, w in exact.items()}
    expected = oracle.forward(CONFIG, weights, ids)["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    assert "held in FP8" in str(ledger)
    assert "multiplied out to float64 while reading" not in str(ledger)
    # Quantising the activations moves the logits: it is part of what is compared.
    assert (logits - oracle.forward(CONFIG, exact, ids)["logits"]).abs().max() > 0.01


def content(folder):
    """Every tensor's dtype, shape and bytes."""
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    return {
        n: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()
    }


def test_what_was_kept_is_written_as_it_was_read(published, tmp_path):
    """Several ranks: tests/ranks/test_save_on_ranks.py."""
    folder, _ = published
    kept = sm.Step3p5ForCausalLM.from_pretrained(folder, quantization="fp8")
    save_pretrained(kept, tmp_path)
    assert content(tmp_path) == content(folder)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    asked = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written | asked == written
    linear = {name for name, (_, shape, _) in content(folder).items() if len(shape) == 2}
    plain = {
        name.removesuffix(".weight") for name in linear if name.split(".")[-2] not in QUANTISED
    }
    assert set(written["modules_to_not_convert"]) == plain - {"model.embed_tokens"}
    ids = torch.randint(256, (2, 7))
    for quantization in ("fp8", None):
        models = [
            sm.Step3p5ForCausalLM.from_pretrained(path, quantization=quantization)
            for path in (folder, tmp_path)
        ]
        first, second = (model.state_dict() for model in models)
        assert first.keys() == second.keys()
        for name, weight in first.items():
            assert torch.equal(second[name].view(torch.uint8), weight.view(torch.uint8)), name
        assert torch.equal(models[1](ids), models[0](ids))


def test_a_model_quantised_here_is_written_as_it_is(tmp_path):
    model = sm.Step3p5ForCausalLM.from_config(CONFIG, dtype=torch.float32, quantization="fp8")
    save_pretrained(model, tmp_path)
    again = sm.Step3p5ForCausalLM.from_pretrained(tmp_path, quantization="fp8")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].view(torch.uint8), weight.view(torch.uint8))


def test_a_block_with_several_scales_is_refused_and_the_folder_left_as_it_was(tmp_path):
    model = sm.Step3p5ForCausalLM.from_config(CONFIG, quantization="fp8")
    save_pretrained(model, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    name = "model.layers.3.moe.up_proj.weight"
    weight_views(model)[name].scale[5, 200] *= 2  # a row of the second block of 128
    with pytest.raises(sm.CheckpointError, match=f"{name} is held in FP8 with several scales"):
        save_pretrained(model, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_not_in_fp8_is_quantised_while_reading(published, tmp_path, monkeypatch):
    monkeypatch.setattr("stepmoe.checkpoint._PIECE", 3000)
    plain = sm.Step3p5ForCausalLM.from_config(CONFIG, dtype=torch.float32)
    save_pretrained(plain, tmp_path)
    parallel = sm.ParallelConfig(4, 1, simulate_rank=3)
    model = sm.Step3p5ForCausalLM.from_pretrained(tmp_path, parallel=parallel, quantization="fp8")
    stored = load_file(tmp_path / "model.safetensors")
    layouts = tensor_layouts(CONFIG, parallel, 3)
    for name, view in weight_views(model).items():
        if isinstance(view, BlockScaled):
            expected = multiplied_out(*quantise(stored[name]))[layouts[name].slices]
            assert torch.equal(view.multiplied_out(torch.float64), expected), name


def test_the_model_is_the_oracle_s_with_the_exact_weights(published):
    folder, exact = published
    ids = torch.randint(256, (3, 9))
    model = sm.Step3p5ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with sm.Ledger() as ledger:
        logits = model(ids)
    # float64 arithmetic on weights that were rounded to float32 once: 6e-8 relative each, and about
    # as much in the logits, of magnitude 1; a wrong block is off by whole factors.
    torch.testing.assert_close(
        logits, oracle.forward(CONFIG, exact, ids)["logits"], atol=1e-5, rtol=0
    )
    assert "FP8 weights were multiplied out to float64" in str(ledger)


def test_a_simulated_rank_reads_its_part_in_bfloat16(published):
    folder, exact = published
    parallel = sm.ParallelConfig(4, 2, simulate_rank=3)
    model = sm.Step3p5ForCausalLM.from_pretrained(folder, parallel=parallel)
    layout = tensor_layouts(CONFIG, parallel, 3)["model.layers.2.moe.down_proj.weight"]
    expected = exact["model.layers.2.moe.down_proj.weight"][layout.slices].bfloat16()
    found = model.model.layers[2].moe.down_proj.weight
    assert found.dtype is torch.bfloat16
    # Rounded to float32 first: a tie between two bfloat16 may fall the other way.
    assert (found == expected).float().mean() > 0.999
    torch.testing.assert_close(found.data, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}_scale_inv": None}, f"{UP} of .* is FP8, and its scales, .* are missing"),
        ({f"{UP}_scale_inv": torch.ones(16, 2, 2)}, r"has shape \(16, 2, 2\).*\(16, 3, 2\)"),
        ({UP: torch.ones(16, 272, 160)}, f"{UP}_scale_inv of .* surplus: {UP} is not FP8"),
    ],
)
def test_wrong_scales_are_named(published, tmp_path, changes, message):
    folder, _ = published
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    tensors = {n: t for n, t in (tensors | changes).items() if t is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(sm.CheckpointError, match=message):
        sm.Step3p5ForCausalLM.from_pretrained(tmp_path)


def test_other_blocks_are_refused(published, tmp_path):
    config = json.loads((published[0] / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sm.ConfigError, match=r"weight_block_size = \[64, 64\]"):
        sm.Step3p5Config.from_pretrained(tmp_path)


def anonymous_memory():
    """Bytes of this process that are not pages of a file, which the system can take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_takes_little_memory_beside_what_is_kept(tmp_path):
    """A stacked expert tensor of 67 M numbers: 268 MB in float32, were it multiplied out whole."""
    layout = tensor_layouts(
        CONFIG.replace(num_experts=64, moe_intermediate_size=1024, hidden_size=1024),
        sm.ParallelConfig(),
        0,
    )[UP]
    stored = torch.randint(1, 100, layout.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(fp8.scale_shape(layout.shape)) + 0.5
    save_file({UP: stored, f"{UP}_scale_inv": scales}, tmp_path / "model.safetensors")
    del stored
    target = torch.zeros(layout.shape, dtype=torch.bfloat16)  # touched: it counts already
    checkpoint, peak, done = Checkpoint(tmp_path), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    before = anonymous_memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    checkpoint.copy_into(target, UP, layout)
    done.set()
    watcher.join()
    # A piece of 16 M numbers: 16 MB in FP8, twice 64 MB in float32; the rest is room.
    assert 16e6 < peak[0] - before < 200e6
    expected = stored_part(tmp_path, 63)
    torch.testing.assert_close(target[63].double(), expected, rtol=2**-8, atol=0)  # bfloat16


def stored_part(folder, expert):
    tensors = load_file(folder / "model.safetensors")
    return multiplied_out(tensors[UP][expert], tensors[f"{UP}_scale_inv"][expert])
