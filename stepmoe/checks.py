"""What a shape or a model refuses before anything is computed, naming the value and the way out."""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from stepmoe.errors import ConfigError

if TYPE_CHECKING:
    from stepmoe.config import RopeScaling, Step3p5Config
    from stepmoe.model.kv_cache import KVCache
    from stepmoe.parallel import ParallelConfig

_POSITIVE = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "num_attention_heads_sliding",
    "num_key_value_heads",
    "sliding_window",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "share_expert_dim",
    "max_position_embeddings",
]
_PER_LAYER = [
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
]


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an int, whichever integer it is (numpy's too); ConfigError unless it is one."""
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a whole number {limits}, got {value!r}")
    return number


def check_config(config: Step3p5Config) -> None:
    """Raise ConfigError, naming field and value, for a shape that no model can have."""
    _check_values(config)
    _check_layers(config)
    if config.rope_scaling is not None:
        _check_rope_scaling(config.rope_scaling)
    for heads in (config.num_attention_heads, config.num_attention_heads_sliding):
        if heads % config.num_key_value_heads:
            raise ConfigError(
                f"{heads} query heads cannot be grouped over "
                f"{config.num_key_value_heads} key-value heads"
            )
    for factor in config.partial_rotary_factors:
        if not 0 < factor <= 1 or int(config.head_dim * factor) % 2:
            raise ConfigError(
                f"partial rotary factor {factor} of head_dim {config.head_dim} "
                "must leave an even number of dimensions between 2 and head_dim"
            )
    if config.num_experts_per_tok > config.num_experts:
        raise ConfigError(
            f"top-{config.num_experts_per_tok} routing needs at least as many experts, "
            f"got {config.num_experts}"
        )


def _check_values(config: Step3p5Config) -> None:
    """Each number by itself."""
    for name in _POSITIVE:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
    check_dtype(config.torch_dtype)
    for name in ("rms_norm_eps", "router_scaling_factor"):
        _expect_positive(name, getattr(config, name))
    if not isinstance(config.norm_topk_prob, bool):
        raise ConfigError(f"norm_topk_prob must be true or false, got {config.norm_topk_prob!r}")
    if config.bos_token_id is not None:
        whole_number("bos_token_id", config.bos_token_id, least=0)
    for token in config.eos_token_ids:
        whole_number("eos_token_id", token, least=0)


def _check_layers(config: Step3p5Config) -> None:
    """What is given layer by layer."""
    for name in _PER_LAYER:
        if len(getattr(config, name)) != config.num_hidden_layers:
            raise ConfigError(
                f"{name} has {len(getattr(config, name))} entries "
                f"for {config.num_hidden_layers} layers: give one a layer"
            )
    for kind in (*config.layer_types, *config.rope_scaling_layer_types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"layer type {kind!r} is not known: use full_attention or sliding_attention"
            )
    for name in ("rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        for value in getattr(config, name):
            if value is not None or not name.startswith("swiglu"):  # where None is no limit
                _expect_positive(name, value)
    if len(set(config.moe_layers)) < len(config.moe_layers):
        raise ConfigError(f"moe_layers names a layer twice: {config.moe_layers}")
    outside = [i for i in config.moe_layers if not 0 <= i < config.num_hidden_layers]
    if outside:
        raise ConfigError(
            f"moe_layers names layers {outside}, the model has 0 to {config.num_hidden_layers - 1}"
        )


def _check_rope_scaling(scaling: RopeScaling) -> None:
    for name, value in vars(scaling).items():
        _expect_positive(f"rope_scaling: {name}", value)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low >= high:
        raise ConfigError(f"rope_scaling: low_freq_factor {low} must be below the high one, {high}")


def _expect_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number above 0, got {value!r}")


DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype, from itself or its name ("bfloat16", "torch.bfloat16")."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one a model runs in: use {', '.join(DTYPES)}")
    return cast(torch.dtype, getattr(torch, name))


def check_quantization(quantization: Any) -> Literal["fp8"] | None:
    """How weights are held: None, in the model's dtype, or "fp8"."""
    if quantization not in (None, "fp8"):
        raise ConfigError(f"quantization={quantization!r} is not known: use 'fp8' or None")
    return cast(Literal["fp8"] | None, quantization)


def check_config_type(config: Any) -> None:
    """A model is made from a Step3p5Config, nothing like it."""
    from stepmoe.config import Step3p5Config

    if not isinstance(config, Step3p5Config):
        raise ConfigError(f"config must be a Step3p5Config, got {config!r}")


def check_model(config: Step3p5Config, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """Whether the layout is one, and the shape can be cut by it and is aligned."""
    from stepmoe.parallel import ParallelConfig

    if not isinstance(parallel, ParallelConfig):
        raise ConfigError(f"parallel must be a ParallelConfig, got {parallel!r}")
    parallel.check(config)
    check_alignment(config, parallel, dtype)


def check_generate(config: Step3p5Config, input_ids: Tensor, max_new_tokens: int) -> None:
    """Before the first token is computed: the count, and that the positions suffice."""
    whole_number("max_new_tokens", max_new_tokens)
    check_input(config, input_ids, None)
    # The last new token is not fed back.
    if input_ids.shape[1] + max_new_tokens - 1 > config.max_position_embeddings:
        raise ConfigError(
            f"{input_ids.shape[1]} tokens and {max_new_tokens} new ones exceed "
            f"max_position_embeddings = {config.max_position_embeddings}"
        )


def check_alignment(config: Step3p5Config, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """grouped_mm needs rows of a multiple of 16 bytes (torch 2.11 to 2.13, CPU and CUDA)."""
    if dtype is torch.float64 or not config.moe_layers:
        return
    size_local = config.moe_intermediate_size // parallel.moe_tp
    sizes = {"hidden_size": config.hidden_size, "moe_intermediate_size / (tp/ep)": size_local}
    for name, size in sizes.items():
        if size * dtype.itemsize % 16:
            raise ConfigError(
                f"{name} = {size} in {dtype} makes rows of {size * dtype.itemsize} bytes; the "
                "grouped matrix product of the experts needs a multiple of 16: choose another ep, "
                "or float64"
            )


def check_input(config: Step3p5Config, input_ids: Tensor, cache: KVCache | None) -> None:
    """Shape, dtype, vocabulary, length and, with a cache, the batch it was filled with."""
    if not isinstance(input_ids, Tensor):
        raise ConfigError(
            f"input_ids must be a torch tensor, got {type(input_ids).__name__}: "
            "use torch.tensor(...), (batch, length)"
        )
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"input_ids must be a (batch, length) int64 tensor, got {input_ids.dtype} "
            f"of shape {tuple(input_ids.shape)}"
        )
    batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise ConfigError(f"input_ids of shape {batch} x {length} hold no token")
    if not input_ids.is_cuda:  # on the device the check would wait for it
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ConfigError(
                f"input_ids hold {low if low < 0 else high}, outside the vocabulary of "
                f"{config.vocab_size}"
            )
    start = 0 if cache is None else cache.length
    if start + length > config.max_position_embeddings:
        raise ConfigError(
            f"{start} cached + {length} new tokens exceed max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    if cache is not None:
        if cache.config != config:
            raise ConfigError("the cache was made for another model: use this model's new_cache()")
        if cache.batch_size not in (None, batch):
            raise ConfigError(
                f"the cache holds {cache.batch_size} sequences, input_ids {batch}: "
                "use one cache for one batch, and a new_cache() for another batch size"
            )
        cache.batch_size = batch
