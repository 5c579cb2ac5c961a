"""The ledger's own book-keeping; exact counts on real ranks are in tests/ranks/test_variants.py."""

import pickle

import pytest
import torch

import stepmoe as sm
from stepmoe.comm.ledger import Entry, in_flight, note, record, repeat, untimed

CPU = torch.device("cpu")


def all_reduce_entry(layer=3, size=4):
    shape = (6, 8)
    return Entry(
        op="all_reduce",
        kind="collective",
        layer=layer,
        site="o_proj",
        group="tp",
        group_size=size,
        shape=shape,
        dtype=torch.float32,
        bytes=6 * 8 * 4,
        tensor="attn_output",
    )


def test_nothing_is_kept_without_an_open_ledger():
    with record(all_reduce_entry(), CPU):
        pass
    with sm.Ledger() as ledger:
        pass
    with record(all_reduce_entry(), CPU):
        pass
    assert ledger.steps == []


def test_ledgers_nest_and_travel():
    with sm.Ledger() as outer:
        with record(all_reduce_entry(1), CPU):
            pass
        with sm.Ledger() as inner, record(all_reduce_entry(2), CPU):
            pass
    assert [entry.layer for entry in outer.entries] == [1, 2]
    assert [entry.layer for entry in inner.entries] == [2]
    assert outer.counts() == {"all_reduce": 2}
    assert repr(outer.counts()) == "{'all_reduce': 2}"
    assert outer.counts()["reduce_scatter"] == 0
    again = pickle.loads(pickle.dumps(outer))
    assert again.entries == outer.entries
    assert str(again) == str(outer)


def test_bytes_sent_is_the_ring_s_share():
    """2 (n-1)/n of the tensor for an all_reduce; the two halves of it send half each."""
    entry = all_reduce_entry(size=4)
    assert entry.bytes_sent == 2 * 3 / 4 * 192
    entry.op = "all_gather"
    assert entry.bytes_sent == 3 / 4 * 192
    entry.op = "all_reduce_add_rms_norm"
    assert entry.bytes_sent == 2 * 3 / 4 * 192


def fail_in_a_collective(seen):
    with record(all_reduce_entry(), CPU):
        seen.append(in_flight())
        raise ConnectionError("a peer is gone")


def test_in_flight_names_the_collective_and_clears_after_a_failure():
    assert in_flight() is None
    seen = []
    with pytest.raises(ConnectionError):
        fail_in_a_collective(seen)
    assert seen == ["all_reduce of attn_output, layer 3, o_proj, group tp"]
    assert in_flight() is None


def test_local_work_is_a_step_but_no_collective():
    with sm.Ledger() as ledger, record(Entry(op="attention", kind="local", layer=0), CPU):
        assert in_flight() is None
    assert ledger.entries == []
    assert [step.op for step in ledger.steps] == ["attention"]
    assert ledger.bytes_sent() == 0
    assert "no collective" in str(ledger)


def test_notes_are_written_once():
    with sm.Ledger() as ledger:
        note("the deferred path runs instead")
        note("the deferred path runs instead")
    assert ledger.notes == ["the deferred path runs instead"]
    assert "the deferred path runs instead" in str(ledger)


def test_one_rank_sends_nothing_and_the_ledger_says_so():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny())
    with sm.Ledger() as ledger:
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert ledger.counts() == {}
    assert {step.op for step in ledger.steps} >= {"attention", "experts", "share_expert", "mlp"}


def test_a_ledger_is_opened_once():
    with sm.Ledger() as ledger:
        pass
    with pytest.raises(RuntimeError, match="already been used"), ledger:
        pass


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(sm.RankError("rank 2 raised", rank=2, traceback="here")))
    assert (str(error), error.rank, error.traceback) == ("rank 2 raised", 2, "here")
    late = pickle.loads(pickle.dumps(sm.RankTimeout("too late", waiting={0: "all_reduce"})))
    assert (str(late), late.waiting) == ("too late", {0: "all_reduce"})


def test_a_captured_step_is_written_to_ledgers_when_it_is_repeated():
    def step():
        with record(all_reduce_entry(), CPU):
            note("how it ran")

    with sm.Ledger() as early:
        with untimed() as captured:
            step()
        assert early.steps == early.notes == []
        with sm.Ledger() as late:
            repeat(captured)
            repeat(captured)
    for ledger in (early, late):
        assert ledger.counts() == {"all_reduce": 2}
        assert [entry.seconds for entry in ledger.entries] == [0.0, 0.0]
        assert ledger.notes == ["how it ran"]
        assert 0 < ledger.entries[0].start <= ledger.entries[1].start
    with sm.Ledger() as after:
        step()
    assert after.entries[0].seconds > 0
