"""Exercises of notebook 01: who holds which slice, and what a partial sum is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmoe.config import Step3p5Config
from stepmoe.exercises.exercise import call, exercise, fresh, require, same
from stepmoe.parallel import ParallelConfig, tensor_layouts

NOTEBOOK = "01_one_layer"


@exercise(
    NOTEBOOK,
    lines=2,
    hint="Hint: relu looks at one column of x @ A at a time. Which columns of A does this rank "
    "need for its part, and which rows of B meet them?",
)
def columns_and_rows(attempt: Callable[..., Any]) -> None:
    """Judges the pieces of A (in, F) and B (F, out) of every rank, whether F divides or not."""
    numbers, generator = fresh()
    for n, rest in ((1, 0), (3, 0), (4, 3), (numbers.randint(5, 7), numbers.randrange(5))):
        inner = n * numbers.randint(1, 4) + rest
        a = torch.randn(5, inner, generator=generator, dtype=torch.float64)
        b = torch.randn(inner, 3, generator=generator, dtype=torch.float64)
        pieces = [call(attempt, a, b, rank, n) for rank in range(n)]
        for piece in pieces:
            require(
                isinstance(piece, tuple) and [getattr(p, "ndim", 0) for p in piece] == [2, 2],
                "Return two matrices: this rank's piece of A and its piece of B.",
            )
        _expect_a_cut(pieces, inner, n)
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        total = sum(((x @ left).relu() @ right for left, right in pieces), torch.zeros(4, 3))
        require(
            same(total, (x @ a).relu() @ b),
            "The pieces do not add up to relu(x @ A) @ B. Every column of A must meet its own row "
            "of B, on exactly one rank.",
        )


def _expect_a_cut(pieces: Sequence[tuple[Tensor, Tensor]], inner: int, n: int) -> None:
    """The shapes alone: columns of A, rows of B, each held once, evenly."""
    require(
        all(left.shape[0] == 5 for left, _ in pieces),
        "A piece of A misses rows. With some of A's rows, x @ A is itself a partial sum, and relu "
        "must not see one: cut A by columns.",
    )
    require(
        all(right.shape[1] == 3 for _, right in pieces),
        "A piece of B misses columns. Cut B by rows: they meet the columns of A.",
    )
    held = [left.shape[1] for left, _ in pieces]
    require(
        held == [right.shape[0] for _, right in pieces],
        "A rank's piece of A has more or fewer columns than its piece of B has rows.",
    )
    require(
        sum(held) >= inner,
        f"Of {inner} columns on {n} ranks nobody holds {inner - sum(held)}: mind what remains "
        "where the columns do not divide.",
    )
    require(
        sum(held) <= inner,
        f"The ranks hold {sum(held)} columns of {inner}: the sum counts some of them twice.",
    )
    require(
        max(held) - min(held) <= 1,
        f"{inner} columns are dealt to {n} ranks as {held}: the fullest rank is what all wait for.",
    )


@exercise(
    NOTEBOOK,
    lines=4,
    hint="Hint: neighbouring ranks share experts. Into which group of tp / ep ranks does this one "
    "fall, and which place does it have there?",
)
def expert_slice(attempt: Callable[..., Any]) -> None:
    """Judges the experts and the rows of each that a rank holds by the library's own layout."""
    numbers, _ = fresh()
    layouts = [(4, 2), (8, 4), (8, 2), (8, 1), (4, 4)]
    numbers.shuffle(layouts)
    for tp, ep in layouts:
        experts, size = ep * numbers.randint(2, 5), tp * numbers.randint(2, 5)
        shape = Step3p5Config.tiny().replace(
            num_experts=experts, moe_intermediate_size=size, num_experts_per_tok=1
        )
        for rank in range(tp):
            answer = call(attempt, rank, tp, ep, experts, size)
            layout = tensor_layouts(shape, ParallelConfig(tp, ep), rank)
            held = layout["model.layers.1.moe.up_proj.weight"].slices
            right = tuple(range(part.start, part.stop) for part in held[:2])
            if answer != right:
                _explain(answer, right, rank, tp, ep, experts, size)


def _explain(
    answer: Any, right: tuple[range, ...], rank: int, tp: int, ep: int, experts: int, size: int
) -> None:
    """Why this is not the slice of `rank`."""
    require(
        isinstance(answer, tuple) and [type(part) for part in answer] == [range, range],
        f"Return two ranges, of experts and of rows, not {answer!r}.",
    )
    where = f"Rank {rank} of tp={tp}, ep={ep}, {experts} experts of {size} rows: "
    require(
        len(answer[1]) != size // tp or ep == 1,
        f"{where}an expert is cut by the ranks that share it, tp / ep of them, and not by all tp: "
        "the other groups hold other experts.",
    )
    require(
        answer[0] == right[0],
        f"{where}it holds experts {right[0].start} to {right[0].stop - 1}, not "
        f"{list(answer[0])}. Ranks 0 to tp / ep - 1 share the first experts.",
    )
    require(False, f"{where}of each expert it holds rows {right[1]}, not {answer[1]}.")


@exercise(
    NOTEBOOK,
    lines=2,
    hint="Hint: what the ranks return will be added up. How often is the bias in that sum?",
)
def row_product(attempt: Callable[..., Any]) -> None:
    """Judges the pieces of x @ W + bias, W cut by rows, by their sum."""
    numbers, generator = fresh()
    for n in (1, 4, numbers.randint(5, 7)):
        inner, tokens = n * numbers.randint(2, 4) + 1, numbers.randint(2, 5)
        x = torch.randn(tokens, inner, generator=generator, dtype=torch.float64)
        weight = torch.randn(inner, 3, generator=generator, dtype=torch.float64)
        bias = torch.randn(3, generator=generator, dtype=torch.float64)
        cut = zip(x.tensor_split(n, dim=1), weight.tensor_split(n), strict=True)
        pieces = [call(attempt, *local, bias, rank, n) for rank, local in enumerate(cut)]
        product = x @ weight
        require(
            all(isinstance(p, Tensor) and p.shape == product.shape for p in pieces),
            f"Every rank returns a piece of the whole shape, {tuple(product.shape)}.",
        )
        total = torch.stack(pieces).sum(0)
        require(
            n == 1 or not same(total, product + n * bias),
            f"The sum over {n} ranks has the bias {n} times: a complete value, added to every "
            "addend, is counted once a rank.",
        )
        require(not same(total, product), "The bias is missing: no rank added it.")
        require(same(total, product + bias), "The pieces do not add up to x @ W + bias.")
