"""Greedy decoding: the prompt in one pass, then a token a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepmoe.model.kv_cache import KVCache

if TYPE_CHECKING:
    from stepmoe.causal_lm import Step3p5ForCausalLM


def generate(model: Step3p5ForCausalLM, input_ids: Tensor, max_new_tokens: int) -> Tensor:
    """See Step3p5ForCausalLM.generate."""
    batch, length = input_ids.shape
    eos = torch.tensor(model.config.eos_token_ids, device=input_ids.device, dtype=torch.int64)
    ended = torch.zeros(batch, 1, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids.new_empty(batch, length + max_new_tokens)
    tokens[:, :length] = input_ids
    cache, new = model.new_cache(length + max_new_tokens), input_ids
    for end in range(length, length + max_new_tokens):
        new = next_tokens(model, new, cache)
        if len(eos):
            new = torch.where(ended, eos[0], new)
            ended |= torch.isin(new, eos)
        tokens[:, end : end + 1] = new
        if len(eos) and bool(ended.all()):
            return tokens[:, : end + 1]
    return tokens


def next_tokens(model: Step3p5ForCausalLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """The likeliest next token of each sequence: (batch, L) new tokens to (batch, 1)."""
    return model(tokens, cache, last_only=True).argmax(-1)
