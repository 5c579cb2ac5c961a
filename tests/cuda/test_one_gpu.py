"""The same checks on an NVIDIA GPU: four ranks that share one, and one rank that has it alone.

Communication times mean nothing here: the ranks take turns. What is checked is that every variant
is right on CUDA tensors. Run with `make test-cuda`.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stepmoe as sm

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
REFERENCE = load_file(TINY / "reference.safetensors")
pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def shared_gpu():
    """Four ranks that see one GPU, however many there are."""
    with pytest.MonkeyPatch.context() as patch:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        patch.setenv("CUDA_VISIBLE_DEVICES", visible.partition(",")[0])
        with sm.Ranks(4, device="cuda") as ranks:
            yield ranks


def one_pass(path, variant, parallel, dtype, input_ids):
    model = sm.Step3p5ForCausalLM.from_pretrained(path, variant, parallel, dtype=dtype)
    with sm.Ledger() as ledger:
        logits = model(input_ids)
    cache = model.new_cache()
    decoded = torch.cat([model(part, cache) for part in input_ids.split([13, 1, 26], dim=1)], dim=1)
    return logits, decoded, str(logits.device), ledger


LAYOUTS = [
    (variant, ep, attention)
    for variant, ep, attention in itertools.product(sm.VARIANTS, (1, 2, 4), ("tp", "dp"))
]


@pytest.mark.parametrize(("variant", "ep", "attention"), LAYOUTS)
def test_reference_with_four_ranks_on_one_gpu(shared_gpu, variant, ep, attention):
    parallel = sm.ParallelConfig(4, ep, attention)
    ids = REFERENCE["input_ids"]
    results = shared_gpu.run(one_pass, TINY, variant, parallel, torch.float32, ids)
    for logits, decoded, device, ledger in results:
        assert device.startswith("cuda")
        # 1e-4: float32 without TF32 on both sides, other orders of summation, entries to 20.
        torch.testing.assert_close(logits, REFERENCE["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(decoded, REFERENCE["logits"], atol=1e-4, rtol=0)
        assert torch.equal(logits, results[0][0]), "ranks differ"
        assert all(entry.seconds > 0 for entry in ledger.entries)


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_bfloat16_on_the_gpu_stays_near_float32(shared_gpu, variant):
    ids = REFERENCE["input_ids"][:, :8]
    results = shared_gpu.run(
        one_pass_short, TINY, variant, sm.ParallelConfig(4, 2), torch.bfloat16, ids
    )
    for logits in results:
        exact = REFERENCE["logits"][:, :8]
        # Mean: a near-tie in the router may pick another expert; bf16 keeps 8 bits over 4 layers.
        error = (logits.float() - exact).abs().mean() / exact.abs().mean()
        assert error < 0.15, f"mean relative error {error}"


def one_pass_short(path, variant, parallel, dtype, input_ids):
    return sm.Step3p5ForCausalLM.from_pretrained(path, variant, parallel, dtype=dtype)(input_ids)


def generated(path, variant, parallel, input_ids):
    model = sm.Step3p5ForCausalLM.from_pretrained(path, variant, parallel, dtype=torch.bfloat16)
    with sm.Ledger() as ledger:
        tokens = model.generate(input_ids, 6)
    return tokens.cpu(), ledger.notes


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_ranks_that_share_decode_without_a_graph_and_say_so(shared_gpu, variant):
    ids = REFERENCE["input_ids"][:, :20]
    results = shared_gpu.run(generated, TINY, variant, sm.ParallelConfig(4, 2), ids)
    for tokens, notes in results:
        assert tokens.shape == (2, 26)
        assert torch.equal(tokens, results[0][0]), "ranks differ"
        assert any("without a CUDA graph: the ranks of tp" in note for note in notes)


def test_ranks_say_that_they_share(shared_gpu):
    assert "gloo" in shared_gpu.describe()


def test_one_rank_alone_takes_the_gpu_and_nccl(tmp_path):
    script = (
        "import torch, torch.distributed as dist, stepmoe as sm\n"
        "from safetensors.torch import load_file\n"
        "device = sm.init_distributed()\n"
        "x = torch.ones(3, device=device); dist.all_reduce(x)\n"
        f"ids = load_file({str(TINY / 'reference.safetensors')!r})\n"
        f"model = sm.Step3p5ForCausalLM.from_pretrained({str(TINY)!r})\n"
        "error = (model(ids['input_ids']).cpu() - ids['logits']).abs().max().item()\n"
        "print(device, dist.get_backend(), x.tolist(), error < 1e-4)\n"
    )
    file = tmp_path / "one_rank.py"
    file.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", str(file)]
    own = {name: value for name, value in os.environ.items() if name != "STEPMOE_DEVICE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=own)
    assert done.returncode == 0, done.stderr
    assert "cuda:0" in done.stdout
    assert "nccl" in done.stdout
    assert "[1.0, 1.0, 1.0] True" in done.stdout
