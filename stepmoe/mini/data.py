"""Training rows: worked examples one after the other, drawn while the model trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stepmoe.mini.few_shot import MAX_NEW_TOKENS, PROMPT_TOKENS, ask, example
from stepmoe.mini.task import stream
from stepmoe.mini.tokenizer import encode

ROW_TOKENS = PROMPT_TOKENS + MAX_NEW_TOKENS  # the positions that answering uses
# Seeds of the data lie above those that anyone would give `questions` by hand.
_FIRST_SEED = 1_000_000

Batch = tuple[Tensor, Tensor]


class PackedRows(IterableDataset[Batch]):
    """Batches without end; each worker process draws questions of its own.

    A batch is input_ids and targets, (rows, ROW_TOKENS) int64 each. A target is the token that
    follows where that token belongs to a worked answer or ends it, and -100 elsewhere.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index = worker.id if worker else 0
        tokens = _tokens(_FIRST_SEED + 1000 * self.seed + index)
        while True:
            rows = [_row(tokens) for _ in range(self.rows)]
            ids, is_answer = (torch.tensor(part) for part in zip(*rows, strict=True))
            yield ids[:, :-1], ids[:, 1:].masked_fill(~is_answer[:, 1:], -100)


def loader(rows: int, seed: int, workers: int) -> Iterator[Batch]:
    """Batches of `rows` rows: the same for the same seed and number of worker processes."""
    return iter(
        DataLoader(
            PackedRows(rows, seed),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )


def _row(examples: Iterator[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    """One token more than a row: the last one is only a target. The last example is cut off."""
    ids: list[int] = []
    is_answer: list[bool] = []
    while len(ids) <= ROW_TOKENS:
        more, answers = next(examples)
        ids += more
        is_answer += answers
    return ids[: ROW_TOKENS + 1], is_answer[: ROW_TOKENS + 1]


def _tokens(seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens of one example after the other, and which of them the model has to write."""
    for question in stream("train", seed):
        ids, given = encode(example(question)), len(encode(ask(question)))
        yield ids, [i >= given for i in range(len(ids))]
