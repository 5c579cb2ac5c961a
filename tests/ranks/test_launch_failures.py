"""Each way a call can fail, inside the time it may take to say so; then the next call works.

The functions are local so that they travel by value, as those of a notebook's cells do. The time
limits are the required ones, for 2 cores, with no margin: measured on a quiet machine the figures
are a third of them or less.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stepmoe.errors import ConfigError, RankError, RankTimeout
from stepmoe.launch import Ranks


@pytest.fixture(autouse=True)
def next_call_works(ranks4: Ranks) -> Iterator[None]:
    yield

    def sum_of_ranks() -> float:
        ones = torch.full((3,), float(dist.get_rank()))
        dist.all_reduce(ones)
        return ones[0].item()

    assert ranks4.run(sum_of_ranks) == [6.0] * 4


class Stopwatch:
    def __enter__(self) -> "Stopwatch":
        self.start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self.start


def only(rank: int, act: Callable[[], Any]) -> Callable[[], None]:
    """A function in which one rank acts and the others wait for it in an all_reduce."""

    def function() -> None:
        if dist.get_rank() == rank:
            act()
        dist.all_reduce(torch.ones(1000))

    return function


def fail_with(message: str) -> Callable[[], None]:
    def fail() -> None:
        raise ValueError(message)

    return fail


def test_the_rank_that_raised_is_named_first(ranks4: Ranks) -> None:
    with Stopwatch() as watch, pytest.raises(RankError) as caught:
        ranks4.run(only(2, fail_with("odd shape")))
    assert watch.seconds < 1
    assert caught.value.rank == 2
    assert str(caught.value).startswith("rank 2 raised ValueError: odd shape")
    assert "raise ValueError(message)" in caught.value.traceback
    assert "in fail" in caught.value.traceback
    assert "ipyparallel" not in str(caught.value)
    assert "/" not in str(caught.value).replace("tests/ranks/test_launch_failures.py", "")
    assert "the next call works" in str(caught.value).lower()


def test_peers_that_compute_do_not_delay_the_report(ranks4: Ranks) -> None:
    def function() -> None:
        if dist.get_rank() == 1:
            raise KeyError("expert 7")
        time.sleep(60)

    with Stopwatch() as watch, pytest.raises(RankError, match="KeyError: 'expert 7'") as caught:
        ranks4.run(function)
    assert watch.seconds < 1
    assert caught.value.rank == 1


def test_peers_in_native_code_are_given_up(ranks4: Ranks) -> None:
    def function() -> None:
        if dist.get_rank() == 3:
            time.sleep(0.3)
            raise ValueError(f"at {time.time()}")
        dist.all_reduce(
            torch.ones(1), group=dist.new_group([0, 1, 2], use_local_synchronization=True)
        )
        # An operation that heeds no signal, as a long kernel would.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        time.sleep(60)

    with pytest.raises(RankError, match="ValueError: at") as caught:
        ranks4.run(function)
    raised_at = float(str(caught.value).split()[5])
    assert time.time() - raised_at < 1
    assert "being restarted" in str(caught.value)


def test_several_that_raise_are_counted(ranks4: Ranks) -> None:
    def function() -> None:
        time.sleep(0.0 if dist.get_rank() == 3 else 0.02)
        raise ValueError("first" if dist.get_rank() == 3 else "later")

    with pytest.raises(RankError) as caught:
        ranks4.run(function)
    assert caught.value.rank == 3
    assert "3 more failed with it: ranks 0, 1, 2" in str(caught.value)


def test_the_same_error_everywhere_is_blamed_on_the_lowest_rank(ranks4: Ranks) -> None:
    """So that a notebook's output is the same each time."""
    with pytest.raises(RankError, match="ZeroDivisionError") as caught:
        ranks4.run(lambda: 1 // 0)
    assert caught.value.rank == 0


def test_a_cause_is_kept(ranks4: Ranks) -> None:
    def function() -> None:
        try:
            fail_with("inner")()
        except ValueError as error:
            raise RuntimeError("outer") from error

    with pytest.raises(RankError) as caught:
        ranks4.run(function)
    inner, outer = (caught.value.traceback.index(text) for text in ("inner", "outer"))
    assert inner < outer


def test_a_collective_never_entered(ranks4: Ranks) -> None:
    with Stopwatch() as watch, pytest.raises(RankTimeout) as caught:
        ranks4.run(only(1, lambda: time.sleep(60)), timeout=1)
    assert watch.seconds < 1 + 4
    waiting = caught.value.waiting
    assert [waiting[rank] for rank in (0, 2, 3)] == ["all_reduce"] * 3
    assert waiting[1].startswith("not in one")
    assert "time.sleep(60)" in waiting[1]
    assert "rank 1: not in one" in str(caught.value)


def test_a_rank_that_returned_while_others_wait(ranks4: Ranks) -> None:
    def function() -> None:
        if dist.get_rank() != 0:
            dist.broadcast(torch.ones(10), src=0)

    with Stopwatch() as watch, pytest.raises(RankTimeout) as caught:
        ranks4.run(function, timeout=1)
    assert watch.seconds < 1 + 4
    assert caught.value.waiting[0].startswith("not in one")
    assert [caught.value.waiting[rank] for rank in (1, 2, 3)] == ["broadcast"] * 3


def test_all_ranks_stuck_in_native_code(ranks4: Ranks) -> None:
    def function() -> None:
        if dist.get_rank() < 2:
            dist.all_reduce(torch.ones(10))
        else:
            dist.broadcast(torch.ones(10), src=0)

    with Stopwatch() as watch, pytest.raises(RankTimeout, match="being restarted") as caught:
        ranks4.run(function, timeout=1)
    assert watch.seconds < 1 + 4
    assert list(caught.value.waiting.values()) == ["all_reduce"] * 2 + ["broadcast"] * 2


def test_a_function_that_ignores_interrupts(ranks4: Ranks) -> None:
    def function() -> None:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(60)

    with Stopwatch() as watch, pytest.raises(RankTimeout) as caught:
        ranks4.run(function, timeout=1)
    assert watch.seconds < 1 + 4
    assert all(text.startswith("not in one") for text in caught.value.waiting.values())


def test_a_function_that_swallows_the_interrupt_is_late_all_the_same(ranks4: Ranks) -> None:
    def function() -> str:
        try:
            time.sleep(60)
        except BaseException:
            return "as if in time"
        return "in time"

    with pytest.raises(RankTimeout, match=r"did not end within 0\.3 s"):
        ranks4.run(function, timeout=0.3)


def test_of_a_builtin_no_line_is_named(ranks4: Ranks) -> None:
    """It was "<module>, line 1 of <string>", the engine's own."""
    with pytest.raises(RankTimeout) as caught:
        ranks4.run(time.sleep, 60, timeout=0.3)
    assert set(caught.value.waiting.values()) == {"not in one"}


def test_a_module_that_the_ranks_do_not_find(
    ranks4: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_later.py").write_text("def seven():\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    seven = importlib.import_module("made_later").seven
    with pytest.raises(RankError, match=r"'made_later'\n.*call ranks\.restart\(\)"):
        ranks4.run(seven)
    ranks4.restart()
    assert ranks4.run(seven) == [7] * 4


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by SIGKILL"),
        (lambda: os._exit(3), "rank 1 ended its process with exit code 3"),
    ],
)
def test_a_rank_that_ends(ranks4: Ranks, end: Callable[[], None], how: str) -> None:
    with Stopwatch() as watch, pytest.raises(RankError, match=how) as caught:
        ranks4.run(only(1, end))
    assert watch.seconds < 8
    assert caught.value.rank == 1
    assert "being restarted" in str(caught.value)


def test_a_rank_that_ends_between_calls(ranks4: Ranks) -> None:
    pids = ranks4.run(os.getpid)
    os.kill(pids[2], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RankError, match="rank 2 was killed by SIGKILL between two calls"):
        ranks4.run(os.getpid)


def test_sys_exit_is_an_error(ranks4: Ranks) -> None:
    with pytest.raises(RankError, match="rank 3 raised SystemExit: 5"):
        ranks4.run(only(3, lambda: sys.exit(5)))


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """As a kernel does; tests that a shell started in its background do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupting_the_notebook(ranks4: Ranks, heeds_interrupts: None) -> None:
    pids = ranks4.run(os.getpid)
    threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    with Stopwatch() as watch, pytest.raises(KeyboardInterrupt):
        ranks4.run(only(0, lambda: time.sleep(60)))
    assert watch.seconds < 0.5 + 2.5
    assert ranks4.run(os.getpid) == pids, "ranks that could be freed were restarted"


def test_what_a_signal_raises_in_the_notebook_frees_the_ranks(ranks4: Ranks) -> None:
    """A test's time limit did: the ranks went on, and the next call waited behind the last one."""

    def out_of_time(*_: object) -> None:
        raise TimeoutError("the test takes too long")

    before = signal.signal(signal.SIGALRM, out_of_time)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(TimeoutError, match="the test takes too long"):
            ranks4.run(only(0, lambda: time.sleep(60)))
    finally:
        signal.signal(signal.SIGALRM, before)
    with Stopwatch() as watch:
        assert ranks4.run(dist.get_rank) == [0, 1, 2, 3]
    assert watch.seconds < 5


def test_a_result_that_cannot_be_sent(ranks4: Ranks) -> None:
    with pytest.raises(RankError, match="rank 0 returned generator"):
        ranks4.run(lambda: (i for i in range(3)))


def test_output_before_a_failure_is_shown(
    ranks4: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    def function() -> None:
        print("about to fail")
        raise ValueError

    with pytest.raises(RankError):
        ranks4.run(function)
    assert capsys.readouterr().out == "".join(f"[rank {r}] about to fail\n" for r in range(4))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "60", True, 10**400])
def test_bad_time_limits(ranks4: Ranks, timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout="):
        ranks4.run(lambda: None, timeout=timeout)


def test_bad_functions_and_arguments(ranks4: Ranks) -> None:
    with pytest.raises(TypeError, match="fn=3 is not callable"):
        ranks4.run(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"argument 2 \(lock\) cannot be sent"):
        ranks4.run(print, 1, threading.Lock())
    with pytest.raises(TypeError, match=r"end \(lock\) cannot be sent"):
        ranks4.run(print, 1, end=threading.Lock())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, r"n \(ranks\) must be .* got 0"),
        ({"n": 2.0}, "got 2.0"),
        ({"n": True}, "got True"),
        ({"n": 2, "device": "gpu"}, "device='gpu'"),
        ({"n": 2, "engines": "magic"}, "engines='magic'.*slurm.*ssh"),
    ],
)
def test_bad_ranks(ranks4: Ranks, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Ranks(**arguments)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            Ranks(2, device="cuda")
