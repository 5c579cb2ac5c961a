"""Kernels have no backward: what autograd watches runs as the reference, on a GPU too.

CPU tensors pass for a GPU's here, and what would be a kernel raises.
"""

import importlib
import inspect
import pkgutil
import types

import pytest
import torch

import stepmoe as sm
from stepmoe import kernels
from stepmoe.kernels import dispatch
from stepmoe.kernels.permute import sort_by_expert
from stepmoe.mini.trainer import training_logits
from stepmoe.variants import LAYERS

MODULES = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
REFERENCES = sorted(name for name in MODULES - {"dispatch"} if not name.endswith("_gpu"))


class KernelRan(Exception):
    pass


def dispatched():
    """Every operation that has a GPU version, by name."""
    modules = [importlib.import_module(f"stepmoe.kernels.{name}") for name in REFERENCES]
    return {
        name: function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if hasattr(function, "__wrapped__")
    }


class Kernels:
    """The module of any GPU version: some raise, the rest are their references."""

    def __init__(self, raising):
        self.raising = raising

    def __getattr__(self, name):
        def kernel(*args, **kwargs):
            if name in self.raising:
                raise KernelRan(name)
            return dispatched()[name].__wrapped__(*args, **kwargs)

        return kernel


def pass_for_a_gpu(monkeypatch, raising):
    stand_in = Kernels(raising)
    found = types.SimpleNamespace(import_module=lambda module: stand_in)
    monkeypatch.setattr(dispatch, "importlib", found)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)


def arguments():
    """A call of each: 6 tokens of 8 entries, 2 of 4 experts each, all of them here."""
    x, weight, gate = torch.randn(6, 8), torch.randn(8), torch.randn(6, 2)
    ids = torch.rand(6, 4).topk(2).indices
    order = sort_by_expert(ids, 0, 4)
    rows, matrices = torch.randn(12, 8), torch.randn(4, 6, 8)
    query, keys, values = torch.randn(2, 2, 3, 4), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    zero = torch.zeros(1, dtype=torch.int64)
    return {
        "gemma_rms_norm": (x, weight, 1e-5),
        "add_gemma_rms_norm": (x, torch.randn(6, 8), weight, 1e-5),
        "clamped_swiglu": (x, 7.0),
        "compute_logits": (x, torch.randn(4, 8)),
        "linear": (x, torch.randn(4, 8)),
        "linear_swiglu": (x, torch.randn(4, 8), 7.0),
        "few_gate_up": (x, matrices, ids, 0, None),
        "few_down": (torch.randn(6, 2, 8), matrices, ids, torch.rand(6, 2), 0, torch.randn(6, 6)),
        "choose_experts": (torch.randn(6, 4), torch.randn(4), 2, True, 3.0),
        "permute_rows": (x, order, 0, 12),
        "quantise_rows": (x, 0, 1),
        "unpermute_rows": (rows, order, torch.rand(6, 2), 0, x),
        "gate_up_swiglu": (x, matrices, order, 0, 12, None),
        "grouped_linear": (rows, matrices, order, 0),
        "qk_norm_rotary": (
            torch.randn(6, 18), 2, torch.randn(4), torch.randn(4), 1e-5, torch.rand(2), zero, 2, 1,
        ),
        "prefill_attention": (query, keys, values, gate, None),
        "decode_attention": (query[:, :, :1], keys, values, gate[:2], zero + 2),
    }  # fmt: skip


def test_every_operation_is_tried():
    assert set(arguments()) | {"sort_by_expert"} == set(dispatched())


@pytest.mark.parametrize("name", arguments())
def test_one_watched_argument_is_enough(monkeypatch, name):
    function, given = dispatched()[name], arguments()[name]
    pass_for_a_gpu(monkeypatch, {name})
    with pytest.raises(KernelRan, match=name):
        function(*given)
    for i, value in enumerate(given):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            watched = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
            watched[i].requires_grad_()
            before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in watched]
            function(*watched)
            for old, new in zip(before, watched, strict=True):
                assert not isinstance(old, torch.Tensor) or torch.equal(old, new), "overwritten"
            with torch.no_grad(), pytest.raises(KernelRan, match=name):
                function(*watched)


# Training runs on one rank, with all tokens.
@pytest.mark.parametrize("variant", [v for v in sm.VARIANTS if not LAYERS[v].shards_residual])
def test_a_training_step_on_a_gpu_is_that_of_the_references(monkeypatch, variant):
    ids, gradients = torch.randint(256, (2, 7)), []
    for on_gpu in (False, True):
        if on_gpu:  # the sort has integers in and out: there is no gradient to lose
            pass_for_a_gpu(monkeypatch, set(dispatched()) - {"sort_by_expert"})
        model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant)
        weights = {n: w for n, w in model.named_parameters() if not n.endswith("router_bias")}
        for weight in weights.values():
            weight.requires_grad_()
        training_logits(model, ids).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in weights.items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    with torch.no_grad(), pytest.raises(KernelRan):
        training_logits(model, ids)
