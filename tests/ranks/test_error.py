"""Numerical error and batch invariance on real ranks, against the oracle."""

import oracle
import pytest
import torch

import stepmoe as sm
from stepmoe.comm.summation import ORDERS
from stepmoe.measure.error import exact_pass, numerical_error
from stepmoe.measure.invariance import batch_invariance
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import random_tensor
from stepmoe.variants import DeferredLayer

CONFIG = sm.Step3p5Config.tiny()


def some_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length))


def test_the_reference_is_the_oracle_s():
    ids = some_ids(3, 7)
    layouts = tensor_layouts(CONFIG, sm.ParallelConfig(), 0)
    weights = {name: random_tensor(name, layout, 0) for name, layout in layouts.items()}
    expected, exact = oracle.forward(CONFIG, weights, ids), exact_pass(CONFIG, ids)
    # float64 throughout: 1e-9 is rounding with room.
    torch.testing.assert_close(exact.logits, expected["logits"], atol=1e-9, rtol=1e-9)
    for index, state in enumerate(exact.layers):
        layer = expected[f"{index}.layer_output"]
        torch.testing.assert_close(state, layer, atol=1e-9, rtol=1e-9)


DTYPES = ["float64", "float32", "bfloat16"]


@pytest.mark.parametrize(("attention", "dtypes"), [("tp", DTYPES), ("dp", ["float32"])])
def test_every_variant_dtype_and_order(ranks4, attention, dtypes):
    ids = some_ids(3, 7)  # 21 tokens, which four ranks cannot share evenly
    parallel = sm.ParallelConfig(4, 2, attention)
    frame = numerical_error(
        CONFIG, ids, dtypes=dtypes, orders=ORDERS, parallel=parallel, ranks=ranks4
    )
    assert len(frame) == 4 * len(dtypes) * len(ORDERS)
    assert frame["ranks_agree"].all()
    # A unit of rounding is 1e-16, 6e-8, 4e-3; layers add some up, and in bfloat16 some tokens meet
    # other experts. A wrong sum is off by tens of percents in every dtype.
    bounds = {"float64": (0, 1e-13), "float32": (1e-8, 1e-5), "bfloat16": (1e-4, 0.3)}
    for dtype in dtypes:
        low, high = bounds[dtype]
        rows = frame[frame["dtype"] == dtype]
        for errors in (*rows["layers"], rows["logits"]):
            assert low <= min(errors)
            assert max(errors) < high
    assert (frame["flips"][frame["dtype"] == "float64"] == 0).all()
    assert (frame["kl"][frame["dtype"] == "float32"] < 1e-10).all()
    # One order, one result: the variants that add the same partial sums agree bit for bit. (Not in
    # a ring here: 21 tokens, and the same padded to 24, are cut into different blocks.)
    for _, same in frame[frame["order"].isin(["tree", "wide"])].groupby(["dtype", "order"]):
        of = same.set_index("variant")["fingerprint"]
        assert of["deferred"] == of["fused"] == of["reduce_scatter"]
    unfused = frame[frame["order"] == "library"].set_index(["variant", "dtype"])["fingerprint"]
    for dtype in dtypes:  # on the CPU the fused operation runs its unfused reference
        assert unfused["deferred", dtype] == unfused["fused", dtype]
    # Other orders of rounded additions end on other last bits; else nothing was replaced.
    rounded = frame[(frame["variant"] == "deferred") & (frame["dtype"] == dtypes[-1])]
    assert rounded["fingerprint"].nunique() >= 3


class PeersMatterLayer(DeferredLayer):
    """Lets the other tokens of a batch into a token's result: what invariance rules out."""

    def forward(self, hidden_states, residual, step):
        hidden_states, residual = super().forward(hidden_states, residual, step)
        mean = hidden_states.tensor.mean(0, keepdim=True)
        return hidden_states.with_(hidden_states.tensor + mean), residual


def test_a_batch_that_changes_its_sequences_is_seen(ranks4):
    ids = some_ids(5, 6)
    arguments = {"dtype": "float64", "order": "wide", "ranks": ranks4}
    frame = batch_invariance(CONFIG, ids, [1, 2, 5], **arguments)
    assert frame["batch_size"].tolist() == [1, 2, 5]
    assert (frame["sequences"] == 5).all()
    assert frame["same_bits"][0] == 5  # alone is alone
    assert (frame["largest"] < 1e-12).all()  # float64's rounding
    broken = batch_invariance(CONFIG, ids, [1, 2], PeersMatterLayer, **arguments)
    assert broken["same_bits"].tolist() == [5, 1]  # 2 + 2 + 1: the last one has no neighbour
    assert broken["largest"][1] > 1e-3
    assert broken["kl"][1] > 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ids: numerical_error(CONFIG, ids, dtypes=[]), "0 dtypes and 1 orders"),
        (lambda ids: numerical_error(CONFIG, ids, orders=["random"]), "'random'"),
        (lambda ids: numerical_error(CONFIG, ids, ["four"]), "'four'"),
        (lambda ids: numerical_error(CONFIG, ids.float()), "torch.float32"),
        (
            lambda ids: numerical_error(
                CONFIG, ids, parallel=sm.ParallelConfig(2, simulate_rank=1)
            ),
            "simulate_rank=1",
        ),
        (lambda ids: batch_invariance(CONFIG, ids, [0]), "a batch size must be .* got 0"),
        (lambda ids: batch_invariance(CONFIG, ids, [1], order="random"), "'random'"),
        (
            lambda ids: batch_invariance(CONFIG, ids, [1], parallel=sm.ParallelConfig(2)),
            "tp=2 and 1 rank",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(sm.ConfigError, match=message):
        call(some_ids(2, 3))
