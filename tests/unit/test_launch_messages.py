"""What is said of a failed call: short, and complete where it matters."""

import pickle
import signal
from collections.abc import Callable

import pytest
import torch

from stepmoe.launch import exceptions, failures
from stepmoe.launch.answers import Failure


def failure_of(function: Callable[[], object]) -> Failure:
    """As it arrives in the notebook."""
    try:
        function()
    except BaseException as error:
        failure: Failure = pickle.loads(pickle.dumps(exceptions.describe(error, caller="")))
        exceptions.clear(error)
        return failure
    raise AssertionError("nothing was raised")


def text_of(function: Callable[[], object]) -> str:
    return failures.traceback_text(failure_of(function))


def test_of_an_endless_recursion_head_and_tail_are_kept() -> None:
    def odd(n: int) -> int:
        return even(n + 1)

    def even(n: int) -> int:
        return odd(n + 1)

    def start() -> None:
        odd(0)

    text = text_of(start)
    lines = text.splitlines()
    assert len(lines) < 50
    assert "in start" in text
    assert "return even(n + 1)" in lines[5]
    assert "return even(n + 1)" in "".join(lines[-5:])
    (skipped,) = [line for line in lines if "more frames" in line]
    assert int(skipped.split()[1]) > 500
    assert lines[-1].startswith("RecursionError")


@pytest.mark.parametrize("depth", [1, 19, 20, 21])
def test_a_stack_is_cut_only_when_it_is_long(depth: int) -> None:
    """Two frames beside `depth` of the recursion: that of `failure_of`, and the last."""

    def descend(n: int) -> None:
        if n == 1:
            raise ValueError("at the bottom")
        descend(n - 1)

    text = text_of(lambda: descend(depth))
    frames = depth + 2
    assert text.count(", in descend") == depth - max(0, frames - 20)
    assert (f"... {frames - 20} more frames ..." in text) == (frames > 20)


def test_the_members_of_a_group_are_shown() -> None:
    def fail(error: Exception) -> Exception:
        try:
            raise error
        except Exception as raised:
            return raised

    def several() -> None:
        inner = ExceptionGroup("inside", [fail(KeyError("deep"))])
        raise ExceptionGroup("several", [*(fail(ValueError(f"no {i}")) for i in range(6)), inner])

    text = text_of(several)
    assert "ExceptionGroup: several (7 sub-exceptions)" in text
    assert "its member 5:" in text
    assert "ValueError: no 4" in text
    assert "and 2 more" in text
    assert text.count("raise error") == 5, "each with where it was raised"
    nested = text_of(
        lambda: (_ for _ in ()).throw(
            ExceptionGroup("out", [ExceptionGroup("in", [KeyError("deep")])])
        )
    )
    assert "        KeyError: 'deep'" in nested


def test_a_group_of_lost_connections_is_no_cause() -> None:
    def lost(*others: Exception) -> None:
        raise ExceptionGroup("tasks", [RuntimeError("Connection closed by peer"), *others])

    assert failure_of(lost).consequence
    assert not failure_of(lambda: lost(ValueError("no"))).consequence


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:3763, remote process exited or there was a network "
        "error, NCCL version 2.28.8\nncclRemoteError: A call failed",
        "NCCL error in: ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.20.5\n"
        "ncclInternalError: Internal check failed.\nLast error:\n"
        "socketProgress: Connection closed by remote peer localhost<43236>",
    ],
)
def test_a_peer_that_nccl_has_lost_is_no_cause(text: str) -> None:
    def lost() -> None:
        raise torch.distributed.DistBackendError(text)

    assert failure_of(lost).consequence


def test_causes_in_a_circle_end() -> None:
    def circle() -> None:
        first, second = ValueError("first"), ValueError("second")
        first.__cause__, second.__cause__ = second, first
        raise first

    text = text_of(circle)
    assert text.index("ValueError: second") < text.index("which led to:")
    assert text.endswith("ValueError: first")
    assert text.count("ValueError: first") == 1


def test_of_a_thousand_causes_the_last_are_told() -> None:
    def again() -> None:
        error: Exception = ValueError("attempt 0")
        for attempt in range(1, 2000):
            error, cause = ValueError(f"attempt {attempt}"), error
            error.__cause__ = cause
        raise error

    text = text_of(again)
    assert text.startswith(
        "(the exceptions that led to this one are left out)\nValueError: attempt 1990"
    )
    assert text.endswith("ValueError: attempt 1999")


def test_frames_of_members_and_causes_are_emptied() -> None:
    """What they hold (a process group) must not outlive the call."""

    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    def fail() -> None:
        held = Held()  # noqa: F841
        raise ValueError("no")

    def caught() -> Exception:
        try:
            fail()
        except ValueError as error:
            return error
        raise AssertionError

    group = ExceptionGroup("several", [caught(), caught()])
    group.__cause__ = cause = caught()
    cause.__cause__ = group
    assert Held.alive == 3
    exceptions.clear(group)
    assert Held.alive == 0


def test_an_abort_names_its_usual_cause() -> None:
    """What gloo does to ranks whose tensors differ in shape: 5 of 5 such calls end like this."""
    error = failures.error_from(failures.Outcome(deaths={2: -signal.SIGABRT}), 4, 60, "after")
    assert str(error).startswith("rank 2 was killed by SIGABRT")
    assert "differ in shape or dtype" in str(error)
    killed = failures.error_from(failures.Outcome(deaths={2: -signal.SIGKILL}), 4, 60, "after")
    assert "shape" not in str(killed)


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        (["all_reduce", "all_reduce"], True),
        (["all_reduce", "broadcast"], False),
        (["not in one (busy)", "not in one (busy)"], False),
        (["all_reduce", "not in one (busy)"], False),
    ],
)
def test_when_all_wait_in_the_same_collective_the_causes_are_named(
    where: list[str], hint: bool
) -> None:
    outcome = failures.Outcome(where=dict(enumerate(where)), limit_passed=True)
    message = str(failures.error_from(outcome, 2, 1.0, "after"))
    assert ("differ in shape or dtype" in message) == hint
    assert f"rank 1: {where[1]}" in message
