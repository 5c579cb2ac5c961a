"""Weights in FP8 on four ranks, whose slices cut blocks: every variant against the oracle."""

import oracle
import pytest
import torch
from oracle_fp8 import QUANTISED, Weight, multiplied_out, quantise

import stepmoe as sm
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import random_tensor

# A rank has 80 of 320 rows, 136 of 272: blocks of 128 are cut wherever a weight is.
CONFIG = (
    sm.Step3p5Config.tiny()
    .with_layers(0, 2)
    .replace(intermediate_size=320, share_expert_dim=320, moe_intermediate_size=272)
)
SEED = 11


def logits_in_fp8(variant, parallel, ids):
    """This rank's logits, and what its ledger remarks."""
    model = sm.Step3p5ForCausalLM.from_config(
        CONFIG, variant, parallel, torch.float64, "cpu", SEED, quantization="fp8"
    )
    with sm.Ledger() as ledger:
        logits = model(ids)
    return logits, ledger.notes


@pytest.mark.parametrize(
    ("variant", "tp", "ep", "attention"),
    [
        *((variant, 4, 2, "tp") for variant in sm.VARIANTS),
        ("deferred", 2, 1, "tp"),
        ("reduce_scatter", 4, 4, "dp"),
    ],
)
def test_every_variant_is_the_oracle_s(ranks4, variant, tp, ep, attention):
    ids = torch.randint(CONFIG.vocab_size, (3, 5))
    weights = {}
    for name, layout in tensor_layouts(CONFIG, sm.ParallelConfig(), 0).items():
        weights[name] = random_tensor(name, layout, SEED)
        if name.split(".")[-2] in QUANTISED:
            # Ranks that share the columns of a weight quantise their own part of the activations.
            shared = {"o_proj": tp if attention == "tp" else 1, "down_proj": tp}
            ways = tp // ep if "moe.down" in name else shared.get(name.split(".")[-2], 1)
            weights[name] = Weight(multiplied_out(*quantise(weights[name])), ways)
    expected = oracle.forward(CONFIG, weights, ids)["logits"]
    parallel = sm.ParallelConfig(tp, ep, attention)
    for logits, notes in ranks4.run(logits_in_fp8, variant, parallel, ids):
        # float64: what is left is rounding. A scale of the wrong block is off by tenths.
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
        assert "linear maps: reference: quantised alike, multiplied out" in str(notes)
