"""What the notebooks run."""

import pytest
import torch

import stepmoe as sm
from stepmoe.lesson import encode, forward_pass, refusal
from stepmoe.variants import DeferredLayer


def test_text_becomes_its_bytes():
    ids = encode("It was the best of times", batch=2, length=5)
    assert ids.shape == (2, 5)
    assert bytes(ids.flatten().tolist()) == b"It was the"
    with pytest.raises(sm.ConfigError, match="the text has 3 bytes; 2 pieces of 2 need 4"):
        encode("abc", 2, 2)


def test_a_pass_has_logits_states_and_a_ledger_of_one_forward():
    ids = encode("It was the best of times", 2, 5)
    done = forward_pass("deferred", sm.ParallelConfig(), ids)
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny())
    assert torch.equal(done.logits, model(ids))
    assert sorted(done.states) == [0, 1, 2, 3, 4]
    assert sum(step.op == "attention" for step in done.ledger.steps) == 5


class TwiceReduced(DeferredLayer):
    def dense_mlp(self, hidden_states, step):
        return self.comm.all_reduce(super().dense_mlp(hidden_states, step), "mlp")


def test_a_refusal_is_the_message():
    ids = encode("It was the best of times", 2, 5)
    assert refusal("deferred", sm.ParallelConfig(), ids) == "it ran"
    assert refusal(TwiceReduced, sm.ParallelConfig(), ids).startswith("layer 0, mlp_output is")
