"""A GPU a rank: NCCL's collectives inside a replayed decode graph. Needs two GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

SCRIPT = """
import torch
import torch.distributed as dist
import stepmoe as sm
from stepmoe.generation import next_tokens

device = sm.init_distributed("cuda")
ids = torch.arange(34, device=device).view(2, 17)
for variant in sm.VARIANTS:
    for attention in ("tp", "dp"):
        parallel = sm.ParallelConfig(2, 2, attention)
        model = sm.Step3p5ForCausalLM.from_pretrained({path!r}, variant, parallel, torch.bfloat16)
        replayed = model.generate(ids, 20)
        cache, new, eager = model.new_cache(model.decode_graph.capacity), ids, ids
        for _ in range(20):
            new = next_tokens(model, new, cache)
            eager = torch.cat((eager, new), dim=1)
        both = [torch.empty_like(eager) for _ in range(2)]
        dist.all_gather(both, eager)
        print(variant, attention, torch.equal(replayed, eager), torch.equal(*both), flush=True)
dist.destroy_process_group()
"""


def test_every_variant_decodes_with_nccl_in_the_graph(tmp_path):
    file = tmp_path / "decode.py"
    file.write_text(SCRIPT.format(path=str(TINY)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.endswith(("True", "False"))]
    assert len(lines) == 2 * 8, "eight settings on two ranks"
    assert all(line.endswith("True True") for line in lines), done.stdout
