"""Step3p5Config: the shape of a Step-3.5 model, read from the published config.json layout.

Sources of every field: the published config.json of Step-3.5-Flash and the Step3p5 model code of
sglang, vLLM and transformers (model_type "step3p5").
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stepmoe.checks import check_config
from stepmoe.errors import ConfigError

AttentionType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class RopeScaling:
    """llama3 frequency scaling: long wavelengths are divided by `factor`, short ones kept."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class LayerConfig:
    """What distinguishes one decoder layer from its neighbours."""

    index: int
    attention_type: AttentionType
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    is_moe: bool
    swiglu_limit: float | None
    swiglu_limit_shared: float | None


@dataclass(frozen=True)
class Step3p5Config:
    """Shapes and constants of a Step-3.5 model. Tuples have one entry a layer.

    `moe_layers` are the layers with experts; the others have a dense MLP. Sliding layers see
    `sliding_window` tokens and have `num_attention_heads_sliding` query heads, full ones all tokens
    and `num_attention_heads`. `intermediate_size` is that of the dense MLP. A SwiGLU limit of None
    means no clamp. `torch_dtype` is the dtype that a model has unless another is asked for.

    Raises:
        ConfigError: names the field and the value that no model can have.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    head_dim: int
    num_attention_heads: int
    num_attention_heads_sliding: int
    num_key_value_heads: int
    layer_types: tuple[AttentionType, ...]
    sliding_window: int
    rope_theta: tuple[float, ...]
    partial_rotary_factors: tuple[float, ...]
    rope_scaling: RopeScaling | None
    rope_scaling_layer_types: tuple[AttentionType, ...]
    moe_layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    share_expert_dim: int
    router_scaling_factor: float
    norm_topk_prob: bool
    swiglu_limits: tuple[float | None, ...]
    swiglu_limits_shared: tuple[float | None, ...]
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 262144
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_config(self)

    def layer(self, index: int) -> LayerConfig:
        """The settings of decoder layer `index`."""
        if not 0 <= index < self.num_hidden_layers:
            raise ConfigError(
                f"layer {index} does not exist: the model has layers 0 to "
                f"{self.num_hidden_layers - 1}"
            )
        attention_type = self.layer_types[index]
        is_full = attention_type == "full_attention"
        scaled = attention_type in self.rope_scaling_layer_types
        return LayerConfig(
            index=index,
            attention_type=attention_type,
            num_heads=self.num_attention_heads if is_full else self.num_attention_heads_sliding,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rotary_dim=int(self.head_dim * self.partial_rotary_factors[index]),
            rope_theta=self.rope_theta[index],
            rope_scaling=self.rope_scaling if scaled else None,
            sliding_window=None if is_full else self.sliding_window,
            is_moe=index in self.moe_layers,
            swiglu_limit=self.swiglu_limits[index],
            swiglu_limit_shared=self.swiglu_limits_shared[index],
        )

    @property
    def layers(self) -> list[LayerConfig]:
        """Every decoder layer's settings, in order."""
        return [self.layer(index) for index in range(self.num_hidden_layers)]

    def replace(self, **changes: Any) -> Step3p5Config:
        """A copy with some fields changed, checked like a new one."""
        return replace(self, **changes)

    def with_layers(self, *indices: int) -> Step3p5Config:
        """A shallower model of these layers, in this order: one MoE layer of the published shape
        is `Step3p5Config.flash().with_layers(4)`."""
        kept = [self.layer(index) for index in indices]

        def pick(per_layer: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(per_layer[layer.index] for layer in kept)

        return self.replace(
            num_hidden_layers=len(kept),
            layer_types=pick(self.layer_types),
            rope_theta=pick(self.rope_theta),
            partial_rotary_factors=pick(self.partial_rotary_factors),
            moe_layers=tuple(new for new, layer in enumerate(kept) if layer.is_moe),
            swiglu_limits=pick(self.swiglu_limits),
            swiglu_limits_shared=pick(self.swiglu_limits_shared),
        )

    @classmethod
    def flash(cls) -> Step3p5Config:
        """Step-3.5-Flash as published: 196 B parameters, 11 B active, 45 layers, 288 experts."""
        num_layers = 45
        layer_types = _one_full_three_sliding(num_layers)
        is_full = [kind == "full_attention" for kind in layer_types]
        clamped = range(43, 45)
        return cls(
            hidden_size=4096,
            intermediate_size=11264,
            num_hidden_layers=num_layers,
            vocab_size=128896,
            head_dim=128,
            num_attention_heads=64,
            num_attention_heads_sliding=96,
            num_key_value_heads=8,
            layer_types=layer_types,
            sliding_window=512,
            rope_theta=tuple(5e6 if full else 1e4 for full in is_full),
            partial_rotary_factors=tuple(0.5 if full else 1.0 for full in is_full),
            rope_scaling=RopeScaling(2.0, 131072, 1.0, 32.0),
            rope_scaling_layer_types=("full_attention",),
            moe_layers=tuple(range(3, num_layers)),
            num_experts=288,
            num_experts_per_tok=8,
            moe_intermediate_size=1280,
            share_expert_dim=1280,
            router_scaling_factor=3.0,
            norm_topk_prob=True,
            swiglu_limits=tuple(7.0 if i in clamped else None for i in range(num_layers)),
            swiglu_limits_shared=tuple(16.0 if i in clamped else None for i in range(num_layers)),
        )

    @classmethod
    def tiny(cls) -> Step3p5Config:
        """Every architectural part at laptop size: 5 layers, 16 experts, vocabulary of bytes."""
        num_layers = 5
        layer_types = _one_full_three_sliding(num_layers)
        is_full = [kind == "full_attention" for kind in layer_types]
        return cls(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=num_layers,
            vocab_size=256,
            head_dim=16,
            num_attention_heads=16,
            num_attention_heads_sliding=24,
            num_key_value_heads=4,
            layer_types=layer_types,
            sliding_window=16,
            rope_theta=tuple(5e6 if full else 1e4 for full in is_full),
            partial_rotary_factors=tuple(0.5 if full else 1.0 for full in is_full),
            rope_scaling=RopeScaling(2.0, 64, 1.0, 32.0),
            rope_scaling_layer_types=("full_attention",),
            moe_layers=tuple(range(1, num_layers)),
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            share_expert_dim=64,
            router_scaling_factor=3.0,
            norm_topk_prob=True,
            swiglu_limits=(None,) * (num_layers - 1) + (7.0,),
            swiglu_limits_shared=(None,) * (num_layers - 1) + (16.0,),
            max_position_embeddings=2048,
            torch_dtype="float32",
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Step3p5Config:
        """Read a published config.json.

        Args:
            path: the file, or the folder that holds it.

        Raises:
            ConfigError: the file is absent or not JSON, a field is missing, or it asks for
                something that is not Step3p5.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        if not file.is_file():
            raise ConfigError(
                f"no config.json at {path}: give a checkpoint folder or its config.json"
            )
        try:
            published = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file} is not valid JSON ({error}): give a checkpoint folder or its config.json"
            ) from error
        return cls.from_dict(published)

    @classmethod
    def from_dict(cls, published: dict[str, Any]) -> Step3p5Config:
        """Read the fields of a published config.json, already parsed.

        Per-layer lists may be longer than num_hidden_layers: the surplus belongs to the
        multi-token-prediction layers, which this project ignores.
        """
        from stepmoe.published_config import parse

        return cls(**parse(published))


def _one_full_three_sliding(num_layers: int) -> tuple[AttentionType, ...]:
    return tuple("sliding_attention" if i % 4 else "full_attention" for i in range(num_layers))
