"""Translate the published config.json of Step-3.5 into the fields of Step3p5Config, and back.

Kept apart from config.py because it is the only place that knows the published spelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stepmoe.checks import whole_number
from stepmoe.config import RopeScaling
from stepmoe.errors import ConfigError
from stepmoe.kernels.block_scale import BLOCK

if TYPE_CHECKING:
    from stepmoe.config import Step3p5Config

# Settings that every published Step-3.5 model shares. Another value means another model, and
# running it as if it were this one would be silently wrong.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("step3p5",),
    "moe_router_activation": ("sigmoid",),
    "use_head_wise_attn_gate": (True,),
    "use_qk_norm": (True,),
    "use_moe_router_bias": (True,),
    "need_fp32_gate": (True,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False, None),
}


_ROPE_SCALING = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
)


def parse(published: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for Step3p5Config, from a parsed config.json.

    Raises:
        ConfigError: names the missing or unsupported field.
    """
    if not isinstance(published, dict):
        raise ConfigError(f"config.json must hold an object, got {type(published).__name__}")
    _check_fixed(published)
    num_layers = whole_number("num_hidden_layers", _field(published, "num_hidden_layers"))
    heads = _field(published, "num_attention_heads")
    sliding = _object(published, "attention_other_setting")
    eos = published.get("eos_token_id")
    return {
        "hidden_size": _field(published, "hidden_size"),
        "intermediate_size": _field(published, "intermediate_size"),
        "num_hidden_layers": num_layers,
        "vocab_size": _field(published, "vocab_size"),
        "head_dim": _field(published, "head_dim"),
        "num_attention_heads": heads,
        "num_attention_heads_sliding": sliding.get("num_attention_heads", heads),
        "num_key_value_heads": _field(published, "num_attention_groups"),
        "layer_types": _per_layer(published, "layer_types", num_layers),
        "sliding_window": _field(published, "sliding_window"),
        "rope_theta": _per_layer(published, "rope_theta", num_layers),
        "partial_rotary_factors": _per_layer(published, "partial_rotary_factors", num_layers),
        **_rope_scaling(published),
        "moe_layers": _moe_layers(published, num_layers),
        "num_experts": _field(published, "moe_num_experts"),
        "num_experts_per_tok": _field(published, "moe_top_k"),
        "moe_intermediate_size": _field(published, "moe_intermediate_size"),
        "share_expert_dim": _field(published, "share_expert_dim"),
        "router_scaling_factor": published.get("moe_router_scaling_factor", 1.0),
        "norm_topk_prob": published.get("norm_expert_weight", True),
        "swiglu_limits": _limits(published, "swiglu_limits", num_layers),
        "swiglu_limits_shared": _limits(published, "swiglu_limits_shared", num_layers),
        "rms_norm_eps": published.get("rms_norm_eps", 1e-5),
        "max_position_embeddings": _field(published, "max_position_embeddings"),
        "bos_token_id": published.get("bos_token_id"),
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "torch_dtype": str(
            published.get("torch_dtype") or published.get("dtype") or "bfloat16"
        ).removeprefix("torch."),
    }


def _check_fixed(published: dict[str, Any]) -> None:
    """Refuse settings that make another model of it than the one implemented."""
    for name, allowed in _FIXED.items():
        if published.get(name, allowed[0]) not in allowed:
            raise ConfigError(
                f"config.json says {name} = {published[name]!r}; stepmoe implements {allowed[0]!r}"
            )
    sliding = _object(published, "attention_other_setting")
    if sliding.get("attention_type", "sliding_attention") != "sliding_attention":
        raise ConfigError(
            f"attention_other_setting describes {sliding['attention_type']!r}; "
            "stepmoe implements sliding_attention"
        )
    for name in ("num_attention_groups", "head_dim"):
        if sliding.get(name, published.get(name)) != published.get(name):
            raise ConfigError(
                f"attention_other_setting has {name} = {sliding[name]}, the full layers "
                f"{published.get(name)}: stepmoe needs them equal"
            )
    block = _object(published, "quantization_config").get("weight_block_size", [BLOCK, BLOCK])
    if block != [BLOCK, BLOCK]:
        raise ConfigError(
            f"quantization_config has weight_block_size = {block}; stepmoe reads FP8 weights in "
            f"blocks of {BLOCK} x {BLOCK}"
        )


def _field(published: dict[str, Any], name: str) -> Any:
    if published.get(name) is None:
        raise ConfigError(f"config.json has no {name}: is it the config of a Step-3.5 model?")
    return published[name]


def _object(published: dict[str, Any], name: str) -> dict[str, Any]:
    """A field with fields of its own; empty where it is absent."""
    value = published.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object with fields of its own, got {value!r}")
    return value


def _per_layer(published: dict[str, Any], name: str, num_layers: int) -> tuple[Any, ...]:
    """One entry a layer; a single number means the same on every layer."""
    value = _field(published, name)
    values = value if isinstance(value, list) else [value] * num_layers
    if len(values) < num_layers:
        raise ConfigError(f"{name} has {len(values)} entries for {num_layers} layers")
    return tuple(values[:num_layers])


def _limits(published: dict[str, Any], name: str, num_layers: int) -> tuple[float | None, ...]:
    """The published lists write 0 or null where nothing is clamped."""
    if published.get(name) is None:
        return (None,) * num_layers
    limits = _per_layer(published, name, num_layers)
    return tuple(None if limit in (0, None) else limit for limit in limits)


def _moe_layers(published: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    enum = _field(published, "moe_layers_enum")
    try:
        layers = [int(i) for i in enum.split(",") if i] if isinstance(enum, str) else list(enum)
        if any(type(i) is not int for i in layers):
            raise TypeError
    except (ValueError, TypeError) as error:
        raise ConfigError(f"moe_layers_enum = {enum!r} is not a list of layer numbers") from error
    return tuple(i for i in layers if i < num_layers)


def _rope_scaling(published: dict[str, Any]) -> dict[str, Any]:
    scaling = _object(published, "rope_scaling")
    layer_types = published.get("yarn_only_types") or []
    if not isinstance(layer_types, list):
        raise ConfigError(f"yarn_only_types must be a list of layer types, got {layer_types!r}")
    if not scaling:
        return {"rope_scaling": None, "rope_scaling_layer_types": ()}
    if scaling.get("rope_type") != "llama3":
        raise ConfigError(
            f"rope_scaling has rope_type {scaling.get('rope_type')!r}; stepmoe implements 'llama3'"
        )
    missing = [name for name in _ROPE_SCALING if scaling.get(name) is None]
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}: got {scaling}")
    if not layer_types:  # without the list, the published code scales every layer
        layer_types = ["full_attention", "sliding_attention"]
    return {
        "rope_scaling": RopeScaling(**{name: scaling[name] for name in _ROPE_SCALING}),
        "rope_scaling_layer_types": tuple(layer_types),
    }


def publish(config: Step3p5Config) -> dict[str, Any]:
    """The published config.json of a shape: what `parse` reads back as the same shape."""
    scaling = config.rope_scaling
    return {
        "architectures": ["Step3p5ForCausalLM"],
        **{name: allowed[0] for name, allowed in _FIXED.items()},
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_attention_groups": config.num_key_value_heads,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": config.num_attention_heads_sliding,
            "num_attention_groups": config.num_key_value_heads,
            "head_dim": config.head_dim,
        },
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "rope_theta": list(config.rope_theta),
        "partial_rotary_factors": list(config.partial_rotary_factors),
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **asdict(scaling)},
        "yarn_only_types": list(config.rope_scaling_layer_types),
        "moe_layers_enum": ",".join(map(str, config.moe_layers)),
        "moe_num_experts": config.num_experts,
        "moe_top_k": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "share_expert_dim": config.share_expert_dim,
        "moe_router_scaling_factor": config.router_scaling_factor,
        "norm_expert_weight": config.norm_topk_prob,
        "swiglu_limits": [limit or 0.0 for limit in config.swiglu_limits],
        "swiglu_limits_shared": [limit or 0.0 for limit in config.swiglu_limits_shared],
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": config.torch_dtype,
    }


def publish_fp8(plain: Iterable[str]) -> dict[str, Any]:
    """What config.json says, as quantization_config, of weights in FP8 blocks.

    Args:
        plain: the names of the weights ("lm_head.weight") of linear maps that are not in FP8.
    """
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name.removesuffix(".weight") for name in plain],
    }
