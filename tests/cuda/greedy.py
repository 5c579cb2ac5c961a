"""Greedy decoding step by step, to compare replayed steps with."""

import torch

# Of the highest logit: one step of bfloat16. Closer than that to each other, the two highest are
# equal as often as not, and which of two equal ones argmax takes may depend on how it was launched.
TIE = 2**-7


def eager_tokens(model, input_ids, steps, capacity):
    """(tokens, certain, cache): prompts and new tokens, one by one, and the cache they leave.

    certain: for each sequence how many of its tokens come before the first that was a tie.
    """
    cache, new, tokens = model.new_cache(capacity), input_ids, input_ids
    tied = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    certain = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
    for _ in range(steps):
        logits = model(new, cache, last_only=True)
        first, second = logits.float().topk(2).values[:, 0].unbind(-1)
        tied |= first - second <= TIE * first.abs()
        certain += ~tied
        new = logits.argmax(-1)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens, certain.tolist(), cache
