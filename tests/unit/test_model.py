"""The arithmetic, on one rank, against the reference checkpoint and the float64 oracle."""

from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shapes import configs

import stepmoe as sm
from stepmoe.config import LayerConfig
from stepmoe.kernels.norm import gemma_rms_norm
from stepmoe.model.experts import RoutedExperts
from stepmoe.model.merged import published_views
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import random_tensor

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
REFERENCE = load_file(TINY / "reference.safetensors")
IDS = REFERENCE["input_ids"]
ONE = sm.ParallelConfig()


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_reference_logits_and_hidden_states(variant):
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY, variant=variant)
    capture = sm.Capture()
    logits = model(IDS, capture=capture)
    # 1e-4: both sides are float32; entries reach 20, and 40 roundings of 2^-24 x 20 are 5e-5.
    torch.testing.assert_close(logits, REFERENCE["logits"], atol=1e-4, rtol=0)
    for layer in range(3):
        state = capture[layer]["layer_output"]
        torch.testing.assert_close(state, REFERENCE["hidden_states"][layer + 1], atol=1e-4, rtol=0)
    final = model.model.norm(capture[3]["layer_output"])
    torch.testing.assert_close(final, REFERENCE["hidden_states"][4], atol=1e-4, rtol=0)


def test_oracle_agrees_with_the_reference():
    config = sm.Step3p5Config.from_pretrained(TINY)
    states = oracle.forward(config, load_file(TINY / "model.safetensors"), IDS)
    # The reference is float32: 1e-4 for the reason above. The oracle's own error is 1e-13.
    torch.testing.assert_close(states["logits"].float(), REFERENCE["logits"], atol=1e-4, rtol=0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_intermediate_value_on_random_shapes(data):
    config = data.draw(configs())
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    seed = data.draw(st.integers(0, 2**20))
    variant = data.draw(st.sampled_from(sm.VARIANTS))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    layouts = tensor_layouts(config, ONE, 0)
    weights = {name: random_tensor(name, layout, seed) for name, layout in layouts.items()}
    expected = oracle.forward(config, weights, ids)

    model = sm.Step3p5ForCausalLM.from_config(config, variant, dtype=torch.float64, seed=seed)
    capture = sm.Capture()
    logits = model(ids, capture=capture)
    # float64 throughout; 1e-9 leaves room for large activations, an algebra error shows at 1e-2.
    torch.testing.assert_close(logits, expected["logits"], atol=1e-9, rtol=1e-9)
    for layer, states in capture.states.items():
        for name, value in states.items():
            torch.testing.assert_close(value, expected[f"{layer}.{name}"], atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_decoding_with_the_cache_equals_a_full_prefill(data):
    config = data.draw(configs())
    chunks = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    batch = data.draw(st.integers(1, 3))
    model = sm.Step3p5ForCausalLM.from_config(config, dtype=torch.float64)
    ids = torch.randint(config.vocab_size, (batch, sum(chunks)))
    cache = model.new_cache()
    pieces = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(ids), atol=1e-10, rtol=1e-10)
    assert cache.length == sum(chunks)
    for layer, kept in zip(config.layers, cache.layers, strict=True):
        # Grown by doubling: at most twice the tokens, and never more than a window.
        slots = kept.keys.shape[2]
        assert min(sum(chunks), layer.sliding_window or 512) <= slots
        assert slots <= min(2 * sum(chunks), layer.sliding_window or 512)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_cache_may_be_copied_and_sequences_dropped(data):
    config = data.draw(configs())
    before, after = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    model = sm.Step3p5ForCausalLM.from_config(config, dtype=torch.float64)
    ids = torch.randint(config.vocab_size, (4, before + after))
    rows = torch.tensor(data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))])
    cache = model.new_cache(data.draw(st.sampled_from([0, before, before + after])))
    model(ids[:, :before], cache)
    fewer, same = cache.copy(rows), cache.copy()
    expected = model(ids)
    for kept, chosen in ((fewer, rows), (same, slice(None)), (cache, slice(None))):
        for token in range(before, before + after):
            logits = model(ids[chosen, token : token + 1], kept)
            # float64: another order of summation; what one copy writes must not reach the others.
            torch.testing.assert_close(
                logits, expected[chosen, token : token + 1], atol=1e-10, rtol=1e-10
            )
    with pytest.raises(sm.ConfigError, match=f"holds {len(rows)} sequences"):
        model(torch.zeros(5, 1, dtype=torch.int64), fewer)


def test_a_cleared_cache_starts_over_in_the_same_slots():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    cache = model.new_cache(40)
    first = model(IDS, cache)
    slots = [layer.keys.data_ptr() for layer in cache.layers]
    size = cache.nbytes
    cache.clear()
    # 1e-4: float32, other lengths of matrix products; entries reach 20.
    again = torch.cat([model(part, cache) for part in IDS.split([7, 1, 1, 31], dim=1)], dim=1)
    torch.testing.assert_close(again, first, atol=1e-4, rtol=0)
    assert [layer.keys.data_ptr() for layer in cache.layers] == slots
    # One full layer of 40 slots, three of a window of 8: 2 sequences x 4 heads x 16 x 4 bytes.
    assert size == cache.nbytes == 2 * (40 + 3 * 8) * 2 * 4 * 16 * 4


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_logits_of_the_last_token_alone(variant):
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY, variant)
    last = model(IDS, last_only=True)
    # 1e-4: the head's product has other shapes, entries reach 20.
    torch.testing.assert_close(last, model(IDS)[:, -1:], atol=1e-4, rtol=0)


def test_generate_is_the_argmax_of_full_prefills():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    expected = IDS[:, :20]
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(IDS[:, :20], max_new_tokens=12), expected)


def test_generate_stops_at_the_end_of_sequence_and_fills_up():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    free = model.generate(IDS[:, :20], max_new_tokens=8)
    # Declare the end a token that sequence 0 produces and sequence 1 does not.
    eos = next(t for t in free[0, 22:].tolist() if t not in free[1, 20:])
    model.config = model.config.replace(eos_token_ids=(eos,))
    stopped = model.generate(IDS[:, :20], max_new_tokens=8)
    first = free[0, 20:].tolist().index(eos)
    assert stopped[0, 20 + first :].eq(eos).all()
    assert torch.equal(stopped[1], free[1])
    assert model.generate(IDS[:1, :20], max_new_tokens=8).shape[1] == 20 + first + 1


def test_a_sequence_is_filled_up_with_the_token_it_ended_with():
    """It was the first of the end tokens, whichever had ended the sequence."""
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    free = model.generate(IDS[:, :20], max_new_tokens=8)
    eos = next(t for t in free[0, 22:].tolist() if t not in free[1, 20:])
    unused = next(t for t in range(256) if t not in free)
    model.config = model.config.replace(eos_token_ids=(unused, eos))
    first = 20 + free[0, 20:].tolist().index(eos)
    assert model.generate(IDS[:, :20], max_new_tokens=8)[0, first:].eq(eos).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_the_loop_over_tokens(dtype):
    """grouped_mm (the fast dtypes) against the oracle, given equal routing."""
    config = sm.Step3p5Config.tiny()
    for ep in (1, 2, 4):
        parallel = sm.ParallelConfig(tp=4, ep=ep)
        x = torch.randn(37, config.hidden_size).to(dtype)
        topk_ids = torch.rand(37, config.num_experts).topk(4).indices
        topk_weights = torch.rand(37, 4)
        full = {
            f"{n}_proj.weight": torch.randn(16, *shape).mul_(shape[1] ** -0.5).to(dtype)
            for n, shape in (("gate", (64, 128)), ("up", (64, 128)), ("down", (128, 64)))
        }
        total = torch.zeros(37, 128, dtype=torch.float64)
        for rank in range(4):
            experts = RoutedExperts(config, config.layer(4), parallel, rank).requires_grad_(False)
            layouts = tensor_layouts(config, parallel, rank)
            experts.to(dtype)
            views = published_views(experts)
            for name, weight in full.items():
                views[name].copy_(weight[layouts[f"model.layers.4.moe.{name}"].slices])
            total += experts.apply_experts(x, topk_ids, topk_weights).double()
        expected = torch.zeros_like(total)
        for t in range(37):
            for e, weight in zip(topk_ids[t].tolist(), topk_weights[t].tolist(), strict=True):
                parts = (full[f"{n}_proj.weight"][e].double() for n in ("gate", "up", "down"))
                expected[t] += weight * oracle.swiglu(
                    x[t].double(), *parts, config.layer(4).swiglu_limit
                )
        # Entries are of size 1: float32 keeps 1e-5; bfloat16 (2^-9) rounds four partial results.
        tolerance = 1e-5 if dtype is torch.float32 else 4e-2
        torch.testing.assert_close(total, expected, atol=tolerance, rtol=tolerance)


def test_norm_is_computed_in_float32_and_keeps_the_one():
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64).mul(0.1).bfloat16()
    expected = oracle.norm(x.double(), weight.double(), 1e-5)
    # One rounding to bfloat16 (2^-9 relative) at the very end, none before.
    torch.testing.assert_close(
        gemma_rms_norm(x, weight, 1e-5).double(), expected, rtol=2**-8, atol=1e-6
    )
    assert gemma_rms_norm(x, torch.zeros(64), 1e-5).abs().mean() > 0.5, "weight 0 means scale 1"


def test_bfloat16_and_float16_models_run_near_the_float32_one():
    exact = sm.Step3p5ForCausalLM.from_pretrained(TINY)(IDS[:, :8])
    for dtype, limit in ((torch.bfloat16, 0.15), (torch.float16, 0.02)):
        logits = sm.Step3p5ForCausalLM.from_pretrained(TINY, dtype=dtype)(IDS[:, :8])
        assert logits.dtype is dtype
        # Mean, not maximum: a near-tie in the router may pick another expert for a token.
        error = (logits.float() - exact).abs().mean() / exact.abs().mean()
        assert error < limit, f"{dtype}: mean relative error {error}"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "shape"),
        (torch.zeros(1, 3), "float32"),
        (torch.zeros(0, 3, dtype=torch.int64), "no token"),
        (torch.full((1, 3), 256), "256"),
        (torch.full((1, 3), -1), "-1"),
        (torch.zeros(1, 513, dtype=torch.int64), "513"),
    ],
)
def test_bad_input_ids_are_named(ids, message):
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    with pytest.raises(sm.ConfigError, match=message):
        model(ids)


def test_a_cache_serves_one_batch_only():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    cache = model.new_cache()
    model(IDS, cache)
    with pytest.raises(sm.ConfigError, match="2 sequences, input_ids 1"):
        model(IDS[:1], cache)


def test_a_cache_serves_one_dtype_and_after_clear_one_batch_size():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    cache = model.new_cache()
    model(IDS, cache)
    low = sm.Step3p5ForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    with pytest.raises(sm.ConfigError, match=r"holds torch.float32, .* in torch.bfloat16"):
        low(IDS[:, :1], cache)
    cache.clear()
    with pytest.raises(sm.ConfigError, match=r"a new_cache\(\) for another batch size"):
        model(IDS[:1], cache)


def test_a_model_does_not_learn():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    assert not model.eval().training
    with pytest.raises(sm.ConfigError, match=r"mini\.trainer, whose training_logits"):
        model.train()


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda", "cuda:0", torch.device("cuda", 99), 3.5])
def test_a_device_that_is_not_there_is_named(device, monkeypatch):
    """Torch said "Torch not compiled with CUDA enabled", an AssertionError."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(sm.ConfigError, match="device="):
        sm.Step3p5ForCausalLM.from_pretrained(TINY, device=device)
    own = sm.Step3p5ForCausalLM.from_pretrained(TINY, device="auto").lm_head.weight.device
    assert own == sm.Step3p5ForCausalLM.from_pretrained(TINY).lm_head.weight.device


def test_one_seed_makes_one_model():
    config = sm.Step3p5Config.tiny()
    ids = torch.randint(256, (2, 9))
    first, again, other = (
        sm.Step3p5ForCausalLM.from_config(config, seed=seed)(ids) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_layer_settings_of_the_published_shape():
    flash = sm.Step3p5Config.flash()
    full, sliding, last = flash.layer(4), flash.layer(5), flash.layer(44)
    assert isinstance(full, LayerConfig)
    assert (full.num_heads, full.rotary_dim, full.sliding_window) == (64, 64, None)
    assert (sliding.num_heads, sliding.rotary_dim, sliding.sliding_window) == (96, 128, 512)
    assert full.rope_scaling is not None
    assert sliding.rope_scaling is None
    assert [layer.is_moe for layer in flash.layers] == [False] * 3 + [True] * 42
    assert (last.swiglu_limit, last.swiglu_limit_shared) == (7.0, 16.0)
    total = sum(
        torch.Size(layout.shape).numel() for layout in tensor_layouts(flash, ONE, 0).values()
    )
    assert round(total / 1e9) == 197  # published: 196 B, without saying how embeddings are counted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int64}, "torch.int64 is not one a model runs in"),
        ({"dtype": "float7"}, "'float7' is not one"),
        ({"parallel": (1, 1)}, r"parallel must be a ParallelConfig, got \(1, 1\)"),
        ({"config": "tiny"}, "config must be a Step3p5Config, got 'tiny'"),
    ],
)
def test_bad_model_arguments_are_named(arguments, message):
    config = arguments.pop("config", sm.Step3p5Config.tiny())
    with pytest.raises(sm.ConfigError, match=message):
        sm.Step3p5ForCausalLM.from_config(config, **arguments)


def test_a_dtype_may_be_given_by_name():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), dtype="bfloat16")
    assert model.lm_head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
def test_bad_counts_of_new_tokens_are_named(count):
    with pytest.raises(sm.ConfigError, match=f"max_new_tokens must be .* got {count!r}"):
        sm.Step3p5ForCausalLM.from_pretrained(TINY).generate(IDS, max_new_tokens=count)


def test_generate_refuses_what_the_positions_cannot_hold_before_it_starts():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY)
    with pytest.raises(sm.ConfigError, match=r"40 tokens and 474 new ones exceed .* 512"):
        model.generate(IDS, max_new_tokens=474)


def test_other_sequences_than_tensors_are_named():
    with pytest.raises(sm.ConfigError, match="must be a torch tensor, got list"):
        sm.Step3p5ForCausalLM.from_pretrained(TINY)([[1, 2]])


def test_a_cache_belongs_to_its_model():
    other = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny()).new_cache()
    with pytest.raises(sm.ConfigError, match="made for another model"):
        sm.Step3p5ForCausalLM.from_pretrained(TINY)(IDS, other)


def test_capture_wants_layers_as_whole_numbers():
    assert sm.Capture(3).layers == sm.Capture(iter([3])).layers == {3}
    with pytest.raises(sm.ConfigError, match=r"a layer must be a whole number .* got 1.5"):
        sm.Capture([1.5])
