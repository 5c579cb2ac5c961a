"""ParallelConfig: how many ranks, and who holds which slice of which tensor.

The layout is sglang's for `--tp 8 --ep 4`: attention, dense MLP and shared expert are cut tp ways;
the experts are dealt to ep groups, and within a group the intermediate size of each expert is cut
moe_tp = tp / ep ways. The sum that completes the routed output runs over all tp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepmoe.checks import whole_number
from stepmoe.errors import ConfigError

if TYPE_CHECKING:
    from stepmoe.config import LayerConfig, Step3p5Config


@dataclass(frozen=True)
class ParallelConfig:
    """tp ranks share one copy of the model; ep of them groups hold different experts.

    Args:
        tp: ranks that share the model (tensor parallel size).
        ep: expert groups; divides tp. Each expert is cut tp / ep ways.
        attention: "tp" cuts the heads over the ranks; "dp" gives every rank whole heads and its own
            sequences (data-parallel attention), so attention needs no sum.
        simulate_rank: build and run this rank's share alone, in one process, its collectives
            recorded but not sent: measures one rank's compute and counts what it would send. Its
            logits are not the model's, because the other ranks' parts of every sum are missing.

    Raises:
        ConfigError: names the numbers that do not fit.
    """

    tp: int = 1
    ep: int = 1
    attention: Literal["tp", "dp"] = "tp"
    simulate_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "ep"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.tp % self.ep:
            raise ConfigError(
                f"ep={self.ep} does not divide tp={self.tp}: "
                "the ranks cannot form equal expert groups"
            )
        if self.attention not in ("tp", "dp"):
            raise ConfigError(f"attention must be 'tp' or 'dp', got {self.attention!r}")
        if self.simulate_rank is not None:
            rank = whole_number("simulate_rank", self.simulate_rank, least=0, most=self.tp - 1)
            object.__setattr__(self, "simulate_rank", rank)

    @property
    def processes(self) -> int:
        """Processes that run the model: one a rank, and one alone for a simulated rank."""
        return self.tp if self.simulate_rank is None else 1

    @property
    def moe_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp // self.ep

    @property
    def attention_tp(self) -> int:
        """Ranks that share the heads of one attention layer."""
        return self.tp if self.attention == "tp" else 1

    def check(self, config: Step3p5Config) -> None:
        """Raise ConfigError if a tensor of `config` cannot be cut this way; starts no rank."""
        for heads, kind in (
            (config.num_attention_heads, "full"),
            (config.num_attention_heads_sliding, "sliding"),
        ):
            if heads % self.attention_tp:
                raise ConfigError(
                    f"{heads} query heads of the {kind} layers cannot be shared by "
                    f"tp={self.attention_tp} ranks: choose a tp that divides {heads}, "
                    "or attention='dp'"
                )
        kv_heads = config.num_key_value_heads
        if kv_heads % self.attention_tp and self.attention_tp % kv_heads:
            raise ConfigError(
                f"{kv_heads} key-value heads can neither be shared by nor replicated over "
                f"tp={self.attention_tp} ranks: one must divide the other"
            )
        for name, size, ways, what in (
            ("intermediate_size", config.intermediate_size, self.tp, "tp"),
            ("share_expert_dim", config.share_expert_dim, self.tp, "tp"),
            ("num_experts", config.num_experts, self.ep, "ep"),
            ("moe_intermediate_size", config.moe_intermediate_size, self.moe_tp, "tp/ep"),
        ):
            if size % ways:
                raise ConfigError(f"{name}={size} cannot be cut {what}={ways} ways")


@dataclass(frozen=True)
class Cut:
    """Slice number `index` of `ways` equal ones, along `dim`."""

    dim: int
    index: int
    ways: int


@dataclass(frozen=True)
class TensorLayout:
    """The full shape of a checkpoint tensor, and the part of it one rank holds."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this rank's part in the full tensor."""
        parts = [slice(0, size) for size in self.shape]
        for cut in self.cuts:
            size = self.shape[cut.dim] // cut.ways
            parts[cut.dim] = slice(cut.index * size, (cut.index + 1) * size)
        return tuple(parts)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        return tuple(part.stop - part.start for part in self.slices)


def tensor_layouts(
    config: Step3p5Config, parallel: ParallelConfig, rank: int
) -> dict[str, TensorLayout]:
    """Name, full shape and slice of every tensor that `rank` (0 to tp - 1) of the model holds.

    Embedding, router, norms and head are held whole by every rank: nothing outside the layers is
    summed. Where tokens are sharded, one all_gather stands before the head.
    """
    parallel.check(config)
    if not 0 <= rank < parallel.tp:
        raise ConfigError(
            f"rank {rank} does not exist: tp={parallel.tp} has ranks 0 to {parallel.tp - 1}"
        )
    vocab, hidden = config.vocab_size, config.hidden_size
    layouts = {"model.embed_tokens.weight": TensorLayout((vocab, hidden))}
    for layer in config.layers:
        prefix = f"model.layers.{layer.index}."
        parts = {
            "input_layernorm.weight": TensorLayout((hidden,)),
            "post_attention_layernorm.weight": TensorLayout((hidden,)),
            **_attention(config, layer, parallel, rank),
            **(_moe(config, parallel, rank) if layer.is_moe else _dense(config, parallel, rank)),
        }
        layouts |= {prefix + name: layout for name, layout in parts.items()}
    layouts["model.norm.weight"] = TensorLayout((hidden,))
    layouts["lm_head.weight"] = TensorLayout((vocab, hidden))
    return layouts


def _attention(
    config: Step3p5Config, layer: LayerConfig, parallel: ParallelConfig, rank: int
) -> dict[str, TensorLayout]:
    """Heads are cut; a key-value head is replicated where there are fewer of them than ranks."""
    hidden, head_dim, ways = config.hidden_size, layer.head_dim, parallel.attention_tp
    index = rank if parallel.attention == "tp" else 0
    kv_ways = min(ways, layer.num_kv_heads)
    rows = (Cut(0, index, ways),)
    kv_rows = (Cut(0, index * kv_ways // ways, kv_ways),)
    q_size, kv_size = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
    return {
        "self_attn.q_proj.weight": TensorLayout((q_size, hidden), rows),
        "self_attn.k_proj.weight": TensorLayout((kv_size, hidden), kv_rows),
        "self_attn.v_proj.weight": TensorLayout((kv_size, hidden), kv_rows),
        "self_attn.g_proj.weight": TensorLayout((layer.num_heads, hidden), rows),
        "self_attn.o_proj.weight": TensorLayout((hidden, q_size), (Cut(1, index, ways),)),
        "self_attn.q_norm.weight": TensorLayout((head_dim,)),
        "self_attn.k_norm.weight": TensorLayout((head_dim,)),
    }


def _mlp(prefix: str, hidden: int, size: int, rank: int, ways: int) -> dict[str, TensorLayout]:
    return {
        f"{prefix}.gate_proj.weight": TensorLayout((size, hidden), (Cut(0, rank, ways),)),
        f"{prefix}.up_proj.weight": TensorLayout((size, hidden), (Cut(0, rank, ways),)),
        f"{prefix}.down_proj.weight": TensorLayout((hidden, size), (Cut(1, rank, ways),)),
    }


def _dense(config: Step3p5Config, parallel: ParallelConfig, rank: int) -> dict[str, TensorLayout]:
    return _mlp("mlp", config.hidden_size, config.intermediate_size, rank, parallel.tp)


def _moe(config: Step3p5Config, parallel: ParallelConfig, rank: int) -> dict[str, TensorLayout]:
    experts, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
    ep_rank, moe_tp_rank = divmod(rank, parallel.moe_tp)
    own_experts = Cut(0, ep_rank, parallel.ep)
    up = TensorLayout((experts, size, hidden), (own_experts, Cut(1, moe_tp_rank, parallel.moe_tp)))
    down = TensorLayout(
        (experts, hidden, size), (own_experts, Cut(2, moe_tp_rank, parallel.moe_tp))
    )
    return {
        "moe.gate.weight": TensorLayout((experts, hidden)),
        "moe.router_bias": TensorLayout((experts,)),
        "moe.gate_proj.weight": up,
        "moe.up_proj.weight": up,
        "moe.down_proj.weight": down,
        **_mlp("share_expert", hidden, config.share_expert_dim, rank, parallel.tp),
    }
