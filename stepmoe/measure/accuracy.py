"""compare_accuracy: what the variants of a model answer, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from stepmoe import mini
from stepmoe.checks import check_dtype, check_generate, check_model, whole_number
from stepmoe.errors import ConfigError
from stepmoe.launch import Ranks
from stepmoe.measure.answering import BATCH_SIZE, Answers, answer_here
from stepmoe.measure.environment import attributes
from stepmoe.measure.latency import check_world, ranks_in, run_everywhere
from stepmoe.measure.plan import named_layers
from stepmoe.measure.significance import Paired, compare_paired
from stepmoe.measure.source import Source, config_of
from stepmoe.measure.task import Outcomes, Task, word_problems
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS, DecoderLayer

if TYPE_CHECKING:
    import pandas as pd


def compare_accuracy(
    variants: Sequence[str | type[DecoderLayer]] = VARIANTS,
    task: Task | None = None,
    *,
    source: Source | None = None,
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    dtype: str | torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    timeout: float | None = 600,
) -> pd.DataFrame:
    """Ask every variant of one model the same questions; greedy, batched, with the cache.

    One row a variant. Columns:
        variant, tp, ep, attention, dtype; questions; right, invalid: numbers of answers;
        accuracy, low, high: with Wilson's 95 % interval;
        seconds: of the rank that took longest, loading the weights left out;
        ranks_agree: whether every rank generated the same tokens;
        marks, answers: of each question, as `Outcomes.to_row`: `outcomes_of` reads them back;
        asked: a digest of the questions: `paired` refuses runs that were asked something else.
    `attrs` holds hardware, versions, dtype, date, the layout and what was asked.

    Args:
        variants: names of sm.VARIANTS, or DecoderLayer subclasses.
        task: None means all held-out word problems.
        source: a folder in the published layout, or a config for random weights; None means
            stepmoe.mini's trained model.
        parallel: None means tp over all ranks. tp must be the number of ranks.
        ranks: where to run; None means this process and, under torchrun, its peers.
        dtype: None means the model's.
        batch_size: questions answered together.
        timeout: seconds for one variant in `ranks`; None for no limit.

    Raises:
        ConfigError: an argument that cannot be measured, before anything is.
        RankError, RankTimeout: as `Ranks.run`.
    """
    import pandas as pd

    source = mini.path() if source is None else source
    task = task or word_problems()
    parallel = parallel or ParallelConfig(tp=ranks_in(ranks))
    check_world(parallel, ranks)
    kind = check_dtype(config_of(source).torch_dtype if dtype is None else dtype)
    layers = check_setting(variants, task, source, parallel, kind, batch_size)
    rows = []
    for name, layer in layers.items():
        setting = (source, layer, parallel, kind)
        asked = (task.prompts, task.max_new_tokens, batch_size, name)
        answers = run_everywhere(ranks, timeout, answer_here, setting, asked)
        rows.append(score_row(name, parallel, kind, task, answers))
    frame = pd.DataFrame(rows)
    frame.attrs = {
        **attributes([rank.place for rank in answers], kind, parallel),
        "task": task.name,
        "questions": len(task),
        "prompt_tokens": task.prompts.shape[1],
        "max_new_tokens": task.max_new_tokens,
        "batch_size": batch_size,
    }
    return frame


def check_setting(
    variants: Sequence[str | type[DecoderLayer]],
    task: Task,
    source: Source,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    batch_size: int,
) -> dict[str, type[DecoderLayer]]:
    """The variants by name; ConfigError for what `compare_accuracy` cannot measure."""
    config = config_of(source)
    if parallel.simulate_rank is not None:
        raise ConfigError(
            f"simulate_rank={parallel.simulate_rank}: a simulated rank's tokens are not the "
            "model's; leave it out to measure accuracy"
        )
    check_model(config, parallel, dtype)
    check_generate(config, task.prompts, task.max_new_tokens)
    whole_number("batch_size", batch_size)
    return named_layers(variants)


def outcomes_of(row: Any) -> Outcomes:
    """The outcomes in a row of `compare_accuracy`'s table."""
    return Outcomes.from_row(row["marks"], row["answers"])


def paired(first: Any, second: Any) -> Paired:
    """McNemar's test between two rows of such tables, live or recorded: second against first.

    Raises:
        ConfigError: they were asked different questions.
    """
    if first["asked"] != second["asked"]:
        raise ConfigError(
            f"{first['variant']} and {second['variant']} were asked different questions "
            f"({first['questions']} and {second['questions']}): only the same can be paired. "
            "Use significance.compare_independent"
        )
    return compare_paired(outcomes_of(first).right, outcomes_of(second).right)


def score_row(
    name: str, parallel: ParallelConfig, dtype: torch.dtype, task: Task, answers: list[Answers]
) -> dict[str, object]:
    """A row of the frame: what the ranks of one setting answered, scored by rank 0's answers."""
    completions = answers[0].completions
    outcomes = task.score(completions)
    accuracy = outcomes.accuracy
    return {
        "variant": name,
        "tp": parallel.tp,
        "ep": parallel.ep,
        "attention": parallel.attention,
        "dtype": str(dtype).removeprefix("torch."),
        "questions": len(task),
        "right": outcomes.num_right,
        "invalid": outcomes.num_invalid,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "seconds": max(rank.seconds for rank in answers),
        "ranks_agree": all(torch.equal(rank.completions, completions) for rank in answers),
        **outcomes.to_row(),
        "asked": task.digest,
    }
