"""The training of the mini model: gradients against an oracle, data, router balance, the script."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

import stepmoe as sm
from stepmoe.mini import few_shot, task, tokenizer
from stepmoe.mini import train as script
from stepmoe.mini.data import ROW_TOKENS, loader
from stepmoe.mini.load import RouterLoad, imbalance, load_of
from stepmoe.mini.trainer import BIAS_SPEED, Trainer, initialise, training_logits
from stepmoe.model.merged import published_views
from tests import oracle

TINY = sm.Step3p5Config.tiny()


def tiny_model(**changes):
    seed = torch.seed() % 1000
    return sm.Step3p5ForCausalLM.from_config(TINY.replace(**changes), seed=seed)


def token_batch(rows, length):
    ids = torch.randint(TINY.vocab_size, (rows, length))
    return ids, torch.randint(TINY.vocab_size, (rows, length))


def test_training_and_answering_compute_the_same():
    model = tiny_model()
    ids, _ = token_batch(3, 11)
    logits = training_logits(model, ids).view(3, 11, -1)
    assert torch.equal(logits, model(ids))  # the same layers, the same order


def test_gradients_are_those_of_the_oracle():
    """Autograd through the plain float64 model that shares no arithmetic with the library."""
    model = tiny_model()
    ids, targets = token_batch(2, 7)
    weights = {n: v.double().requires_grad_() for n, v in published_views(model).items()}
    exact = oracle.forward(model.config, weights, ids)["logits"]
    F.cross_entropy(exact.flatten(0, 1), targets.flatten()).backward()

    model.requires_grad_(True)
    F.cross_entropy(training_logits(model, ids), targets.flatten()).backward()
    for parameter in model.parameters():  # the gradient takes the weight's place, to be named
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, gradient in published_views(model).items():
        expected = weights[name].grad
        if name.endswith("router_bias"):  # it steers a choice, which has no gradient
            assert expected is None
            continue
        # float32 with sums of up to 256 terms: 1e-7 x sqrt(256) x some layers.
        error = (gradient - expected).norm() / expected.norm()
        assert error < 1e-4, (name, float(error))


def test_a_fixed_batch_is_learnt():
    """All the way through: loss, backward, clipping, AdamW, and the weights that follow it."""
    model = tiny_model()
    initialise(model)
    trainer = Trainer(model, steps=20, learning_rate=3e-3)
    batch = token_batch(2, 16)
    losses = [float(trainer.step(batch)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2  # 32 random tokens are soon known by heart
    assert float(trainer.step(batch)) == pytest.approx(losses[-1], abs=0.5)  # the cosine ended
    assert trainer.scale() < 0.05


def test_bfloat16_weights_follow_float32_copies():
    """Steps too small for a bfloat16 weight add up in its copy."""
    model = sm.Step3p5ForCausalLM.from_config(TINY, dtype=torch.bfloat16)
    trainer = Trainer(model, steps=50, learning_rate=1e-5)
    before = [copy.clone() for copy in trainer.copies]
    batch = token_batch(1, 8)
    for _ in range(3):
        trainer.step(batch)
    for copy, old, weight in zip(trainer.copies, before, trainer.weights, strict=True):
        assert not torch.equal(copy, old)
        assert torch.equal(weight, copy.bfloat16())


def test_an_overloaded_expert_loses_bias():
    model = tiny_model()
    layer = model.model.decoder_layers[1]
    layer.moe.router_bias.data[:3] = 5.0  # a score is at most 1: these three are always chosen
    before, chosen = layer.moe.router_bias.clone(), []
    layer.moe.gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output[0]))
    trainer = Trainer(model, steps=1, learning_rate=0.0)
    trainer.step(token_batch(2, 20))
    (topk_ids,) = chosen
    counts = torch.stack([(topk_ids == expert).sum() for expert in range(TINY.num_experts)])
    expected = BIAS_SPEED * (counts.float().mean() - counts).sign()  # by chance 0 for some
    assert expected[:3].tolist() == pytest.approx([-BIAS_SPEED] * 3)
    # float32 near 5, where 0.001 is rounded to 5e-7.
    assert torch.allclose(layer.moe.router_bias - before, expected, atol=1e-6)


def test_load_counts_what_the_router_chooses():
    model = tiny_model()
    ids, _ = token_batch(5, 9)
    chosen = {}
    for layer in model.model.decoder_layers[1:]:
        router, forward = layer.moe.gate, layer.moe.gate.forward

        def kept(x, bias, index=layer.index, forward=forward):
            output = forward(x, bias)
            chosen.setdefault(index, []).extend(output[0].flatten().tolist())
            return output

        router.forward = kept
    counts = load_of(model, ids, batch=2)
    assert set(counts) == set(TINY.moe_layers)
    for index, found in counts.items():
        assert found.tolist() == [chosen[index].count(e) for e in range(TINY.num_experts)]
        assert int(found.sum()) == 5 * 9 * TINY.num_experts_per_tok


def test_counting_stops():
    model = tiny_model()
    load = RouterLoad(model)
    load.close()
    model(token_batch(1, 3)[0])
    assert load.take() == {}


def test_imbalance_is_the_busiest_over_the_mean():
    assert imbalance(torch.tensor([4, 4, 4])) == 1
    assert imbalance(torch.tensor([9, 0, 0])) == 3


def test_only_worked_answers_are_targets():
    ids, targets = next(loader(rows=6, seed=5, workers=0))
    assert ids.shape == targets.shape == (6, ROW_TOKENS)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        text = tokenizer.decode(row)
        answers = [part.partition("Answer:")[2] for part in text.split("Question:")[1:]]
        complete = [answer.removesuffix("\n") for answer in answers if "<eos>" in answer]
        assert complete, text
        shown = tokenizer.decode([token for token in wanted if token != -100])
        expected = "".join(answers).replace("\n", " ")
        # The last answer may be cut off, and has its next token as a target.
        assert shown.split()[: len(expected.split()) - 1] == expected.split()[:-1]
        assert all(t in (-100, n) for t, n in zip(wanted, row[1:], strict=False))
        assert all(task.parse_answer(answer.strip()) is not None for answer in complete)


def test_data_repeat_by_seed_and_hold_no_heldout_question():
    def drawn(seed):
        return [next(batches)[0] for batches in itertools.repeat(loader(4, seed, 0), 2)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    heldout = {question.text for question in task.heldout()}
    for row in torch.cat(first + other).tolist():
        asked = [part.partition("\n")[0] for part in tokenizer.decode(row).split("Question: ")[1:]]
        assert asked
        assert not set(asked) & heldout


def test_the_script_writes_weights_and_log(tmp_path):
    """Two steps: the form of what it writes, not what it learns."""
    log, weights = tmp_path / "log.json", tmp_path / "weights"
    arguments = "--steps 2 --rows 1 --workers 0 --evaluate-every 2 --questions 2"
    arguments += f" --final-questions 3 --device cpu --weights {weights} --log {log}"
    assert script.main(arguments.split()) == 0
    model = sm.Step3p5ForCausalLM.from_pretrained(weights)
    assert model(few_shot.prompt_ids(task.heldout()[:1])).isfinite().all()
    found = json.loads(log.read_text())
    assert found["format"] == script.FORMAT
    assert str(tmp_path) not in log.read_text()
    assert found["command"].startswith("python -m stepmoe.mini.train --steps 2 --rows 1")
    assert [point["step"] for point in found["loss"]] == [2]
    assert found["accuracy"][0]["questions"] == 2
    assert found["final"]["questions"] == 3
    counts = found["final"]["load"]["tokens_per_expert"]
    assert {sum(c) for c in counts.values()} == {3 * few_shot.PROMPT_TOKENS * 4}
