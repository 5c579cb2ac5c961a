"""What a fault does to a model's answers."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepmoe.faults.catalogue import FAULTS
from stepmoe.faults.guards import unchecked
from stepmoe.faults.lab import Setting
from stepmoe.launch import Ranks, rank_device
from stepmoe.measure.accuracy import score_row
from stepmoe.measure.answering import BATCH_SIZE, Answers, answer
from stepmoe.measure.environment import attributes, look_around
from stepmoe.measure.task import Task

if TYPE_CHECKING:
    import pandas as pd


def accuracy_under(
    ranks: Ranks,
    source: str,
    task: Task,
    faults: list[str | None],
    batch_size: int = BATCH_SIZE,
    timeout: float | None = 600,
) -> pd.DataFrame:
    """Ask a model in float32 with each of the faults in it; the placement check is off.

    One row a fault, in the setting its signature is plainest in; None stands for no fault.
    Columns: fault, variant, tp, ep, attention, dtype, questions, right, invalid; accuracy, low,
    high (Wilson's 95 % interval); seconds; ranks_agree; marks and answers of rank 0, as
    `measure.task.Outcomes`; asked, the digest of the questions. `attrs` holds hardware, versions,
    date and what was asked.

    Args:
        ranks: four of them.
        source: folder of a checkpoint.
        faults: names of faults that come to an end.
        timeout: seconds for one fault; None for no limit.
    """
    import pandas as pd

    rows, places = [], []
    for fault in faults:
        variant, parallel = FAULTS[fault].shown_in if fault else FAULTS["wrong_group"].shown_in
        setting = Setting(source, variant, parallel, torch.float32)
        asked = (task.prompts, task.max_new_tokens, batch_size)
        given = ranks.run(answers_here, setting, fault, *asked, timeout=timeout)
        places = [rank.place for rank in given]
        row = score_row(variant, parallel, torch.float32, task, given)
        rows.append({"fault": fault or "none", **row})
    frame = pd.DataFrame(rows)
    frame.attrs = {
        **attributes(places, frame["dtype"][0], FAULTS["wrong_group"].shown_in[1]),
        "task": task.name,
        "questions": len(task),
        "batch_size": batch_size,
    }
    return frame


def answers_here(
    setting: Setting,
    fault: str | None,
    prompts: Tensor,
    max_new_tokens: int,
    batch_size: int,
) -> Answers:
    """In a rank: the new tokens (questions, max_new_tokens), seconds, and where it ran.

    No sequence ends early: ranks that disagree would end at different steps, and then hang. Each
    rank goes on with its own tokens.
    """
    model = setting.model()
    model.config = model.config.replace(eos_token_ids=())
    start = time.perf_counter()
    with unchecked(), FAULTS[fault].inject(model) if fault else nullcontext():
        given = answer(model, prompts, max_new_tokens, batch_size, fault or "no fault")
    return Answers(given, time.perf_counter() - start, look_around(rank_device()))
