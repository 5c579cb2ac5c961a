"""What a simulated rank records is what a real one sends: the same collectives, sizes, places."""

from pathlib import Path

import pytest
import torch

import stepmoe as sm

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"


def entries_of(path, variant, parallel, input_ids):
    model = sm.Step3p5ForCausalLM.from_pretrained(path, variant, parallel, device="cpu")
    cache = model.new_cache()
    with sm.Ledger() as ledger:
        model(input_ids, cache)
        model(input_ids[:, :1], cache)
    return [
        (e.op, e.layer, e.site, e.group, e.group_size, e.shape, e.dtype, e.bytes, e.placement)
        for e in ledger.entries
    ]


@pytest.mark.parametrize("attention", ["tp", "dp"])
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_a_simulated_rank_records_what_a_real_one_sends(ranks4, variant, attention):
    ids = torch.randint(256, (3, 9))  # 27 tokens on 4 ranks: padded; under dp one rank idles
    real = ranks4.run(entries_of, TINY, variant, sm.ParallelConfig(4, 2, attention), ids)
    for rank, sent in enumerate(real):
        parallel = sm.ParallelConfig(4, 2, attention, simulate_rank=rank)
        assert entries_of(TINY, variant, parallel, ids) == sent != []
