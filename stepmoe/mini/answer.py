"""Greedy answers of a model to the word problems: what training reports while it runs.

measure/task.py measures accuracy over ranks; here one rank and one batch suffice.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.mini.few_shot import MAX_NEW_TOKENS, PROMPT_TOKENS, prompt_ids
from stepmoe.mini.task import Question, parse_answer
from stepmoe.mini.tokenizer import decode


def completions(
    model: Step3p5ForCausalLM, asked: Sequence[Question], batch: int = 512
) -> list[str]:
    """What the model writes behind each few-shot prompt, `batch` prompts at a time."""
    texts = []
    for start in range(0, len(asked), batch):
        ids = prompt_ids(asked[start : start + batch])
        new = model.generate(ids, MAX_NEW_TOKENS)[:, PROMPT_TOKENS:]
        texts += [decode(row) for row in new.tolist()]
    return texts


def right(asked: Sequence[Question], texts: Sequence[str]) -> list[bool]:
    """For each question, whether the text ends in its answer."""
    return [parse_answer(t) == q.answer for q, t in zip(asked, texts, strict=True)]
