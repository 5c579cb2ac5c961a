"""One optimiser step of a model of this library, and the balance of its router.

The model runs as it does when it answers (its own layers, in bfloat16 if it is made so); the
optimiser keeps float32 copies of the weights, because a bfloat16 weight would swallow small steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.mini.data import Batch
from stepmoe.mini.load import RouterLoad
from stepmoe.model.merged import published_views

BIAS_SPEED = 1e-3  # of the router bias, a step: DeepSeek-V3's (arXiv:2412.19437, section 4.2)
_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def initialise(model: Step3p5ForCausalLM) -> None:
    """Make a random model (`from_config`) fit for training, in place.

    Norms start at 1 + 0, router biases at 0, and what each sub-layer adds to the residual is made
    small enough that the sum of all of them has the scale of one (GPT-2's rule).
    """
    sublayers = 2 * model.config.num_hidden_layers
    for name, weight in published_views(model).items():
        if weight.dim() == 1:
            weight.zero_()
        elif name.endswith(_OUTPUTS):
            weight.mul_(sublayers**-0.5)


def training_logits(model: Step3p5ForCausalLM, input_ids: Tensor) -> Tensor:
    """Logits (batch x length, vocab) of input_ids (batch, length), with gradients; one rank only.

    `model(input_ids)` gives the same values without gradients.
    """
    logits: Tensor = model.lm_head(model.model(input_ids)).flatten(0, 1)
    return logits


class RouterBalance:
    """Keeps the experts' load even without a loss of its own: overloaded experts lose bias.

    After each step every expert's bias moves by `speed` against its load's deviation from the mean
    (Wang et al., arXiv:2408.15664). The bias steers the choice of experts only, so no gradient has
    to serve two ends.
    """

    def __init__(self, model: Step3p5ForCausalLM) -> None:
        self.load = RouterLoad(model)
        layers = [layer for layer in model.model.decoder_layers if layer.is_moe]
        self.biases = {layer.index: layer.moe.router_bias for layer in layers}

    def update(self, speed: float) -> None:
        """Move the biases by the load since the last update."""
        for layer, counts in self.load.take().items():
            self.biases[layer].data += speed * (counts.float().mean() - counts).sign()


class Trainer:
    """AdamW with a warm-up and a cosine, on float32 copies of a model's weights.

    Args:
        model: on one rank; its weights follow the copies.
        steps: how many there will be; the learning rate ends at 0.
    """

    def __init__(self, model: Step3p5ForCausalLM, steps: int, learning_rate: float) -> None:
        self.model, self.steps, self.learning_rate, self.done = model, steps, learning_rate, 0
        self.balance = RouterBalance(model)
        named = {n: p for n, p in model.named_parameters() if not n.endswith("router_bias")}
        self.weights = [weight.requires_grad_() for weight in named.values()]
        self.copies = [weight.detach().float().clone() for weight in self.weights]
        matrices = [copy for copy in self.copies if copy.dim() > 1]
        vectors = [copy for copy in self.copies if copy.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, 0.95),
            fused=self.copies[0].is_cuda,
        )

    def scale(self) -> float:
        """Of the learning rate at this step: up to 1 over the first 2 %, then a cosine to 0."""
        warm = max(1, self.steps // 50)
        if self.done < warm:
            return (self.done + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (self.done - warm) / (self.steps - warm))

    def step(self, batch: Batch) -> Tensor:
        """Learn from one batch. Returns the mean loss of the answers' tokens, on the device."""
        ids, targets = (part.to(self.copies[0].device, non_blocking=True) for part in batch)
        logits = training_logits(self.model, ids)
        loss = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-100)
        loss.backward()
        for weight, copy in zip(self.weights, self.copies, strict=True):
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        scale = self.scale()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * scale
        self.optimizer.step()
        with torch.no_grad():
            for weight, copy in zip(self.weights, self.copies, strict=True):
                weight.copy_(copy)
        self.balance.update(BIAS_SPEED * scale)
        self.done += 1
        return loss.detach()
