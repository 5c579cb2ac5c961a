"""What a call brings into the ranks and back, and what stays there."""

import itertools
import os
import statistics
import sys
import time
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from stepmoe.launch import Ranks
from stepmoe.launch.rank import prepare_rank


def test_results_come_in_rank_order(ranks4: Ranks) -> None:
    assert ranks4.run(lambda: dist.get_rank()) == [0, 1, 2, 3]


def test_closures_arguments_and_local_classes(ranks4: Ranks) -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    factor = 10

    def scale(offset: int, *, point: Point) -> Point:
        return Point(factor * dist.get_rank() + offset + point.x)

    points = ranks4.run(scale, 1, point=Point(2))
    assert [point.x for point in points] == [3, 13, 23, 33]
    assert isinstance(points[0], Point)


def test_a_variable_may_have_the_name_of_a_submodule(ranks4: Ranks) -> None:
    """cloudpickle would ship torch.distributed.config along, a module of a class it cannot."""
    names = {"dist": dist, "config": 5}
    exec("def place(): return dist.get_rank() + config", names)  # its globals travel by value
    names["place"].__module__ = "__main__"
    assert ranks4.run(names["place"]) == [5, 6, 7, 8]


def test_a_function_may_take_arguments_named_like_ours(ranks4: Ranks) -> None:
    assert ranks4.run(lambda fn: fn, fn=3) == [3] * 4


def test_tensors_go_and_return(ranks4: Ranks) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    for result in ranks4.run(lambda w: {"twice": 2 * w, "same": [w]}, weight):
        assert torch.equal(result["twice"], 2 * weight)
        assert result["same"][0].requires_grad


def test_each_rank_knows_its_place(ranks4: Ranks) -> None:
    def place() -> dict[str, Any]:
        from stepmoe.launch import init_distributed, rank_device

        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "STEPMOE_DEVICE")
        return {
            "environment": [os.environ[name] for name in names],
            "threads": torch.get_num_threads(),
            "device": rank_device(),
            "again": init_distributed(),
            "backend": dist.get_backend(),
        }

    for rank, found in enumerate(ranks4.run(place)):
        assert found["environment"] == [str(rank), "4", str(rank), "cpu"]
        assert found["threads"] == int(os.environ["OMP_NUM_THREADS"])  # as tests/conftest.py says
        assert found["device"] == found["again"] == torch.device("cpu")
        assert found["backend"] == "gloo"
    assert "gloo" in ranks4.describe()
    assert "gloo" in repr(ranks4)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, [2]),
        ({"OMP_NUM_THREADS": "3"}, []),  # torch has read it
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, [2]),  # torchrun's choice, no user's
    ],
)
def test_ranks_share_the_cores_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: list[int]
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    prepare_rank(0, 4, 0, 4, "cpu")
    assert set_to == threads


def test_state_lasts_until_a_call_fails(ranks4: Ranks) -> None:
    def keep() -> None:
        from stepmoe.launch.rank import state

        state["model"] = dist.get_rank()

    def look() -> int | None:
        from stepmoe.launch.rank import state

        return state.get("model")

    ranks4.run(keep)
    assert ranks4.run(look) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError):
        ranks4.run(lambda: 1 // 0)
    assert ranks4.run(look) == [None] * 4


def test_who_destroys_the_group_finds_a_new_one_at_the_next_call(ranks4: Ranks) -> None:
    """Later calls ran as four worlds of one, and every sum was silently a rank's own."""
    for destroys in ([0, 1, 2, 3], [2]):

        def as_at_the_end_of_a_script(ranks: list[int] = destroys) -> int:
            size = dist.get_world_size()
            if dist.get_rank() in ranks:
                dist.destroy_process_group()
            return size

        assert ranks4.run(as_at_the_end_of_a_script) == [4] * 4

        def total() -> float:
            one = torch.ones(1)
            dist.all_reduce(one)
            return one.item()

        assert ranks4.run(total) == [4.0] * 4


def test_state_that_holds_groups_does_not_keep_peers_waiting(ranks4: Ranks) -> None:
    pids = ranks4.run(os.getpid)

    def keep_group_and_fail() -> None:
        from stepmoe.launch.rank import state

        state["group"] = dist.new_group([0, 1, 2, 3])
        if dist.get_rank() == 2:
            raise ValueError("no")
        dist.all_reduce(torch.ones(1), group=state["group"])

    with pytest.raises(RuntimeError, match="rank 2 raised ValueError: no"):
        ranks4.run(keep_group_and_fail)
    assert ranks4.run(os.getpid) == pids, "peers could not be freed: the ranks were restarted"


def test_output_is_prefixed_and_in_rank_order(
    ranks4: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        time.sleep(0.05 * (3 - dist.get_rank()))  # the last rank speaks first
        print("one\ntwo")
        print("trouble", file=sys.stderr)

    ranks4.run(speak)
    captured = capsys.readouterr()
    assert captured.out == "".join(f"[rank {r}] one\n[rank {r}] two\n" for r in range(4))
    assert captured.err == "".join(f"[rank {r}] trouble\n" for r in range(4))


def test_no_output_is_lost(ranks4: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    """Output travels apart from the result, which can arrive first (16 of 200 times, unwaited)."""
    for number in range(60):
        ranks4.run(lambda n=number: print("call", n))
        assert capsys.readouterr().out == "".join(f"[rank {r}] call {number}\n" for r in range(4))


def test_an_empty_call_is_quick(ranks4: Ranks) -> None:
    def median_of_calls() -> float:
        times = []
        for _ in range(40):
            start = time.perf_counter()
            ranks4.run(lambda: None)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    # The best of three medians: whatever else the machine does comes in bursts.
    assert min(median_of_calls() for _ in range(3)) <= 0.020


def test_memory_does_not_grow_with_calls(ranks4: Ranks) -> None:
    """The controller kept every result: 460 MiB after 100 returns of 4 MiB."""

    def resident() -> float:
        me = psutil.Process()
        processes = [me, *me.children(recursive=True)]
        return float(sum(process.memory_info().rss for process in processes)) / 2**20

    def four_mebibytes() -> torch.Tensor:
        return torch.zeros(2**20)

    for _ in range(5):
        ranks4.run(four_mebibytes)  # what is allocated once
    before = resident()
    for _ in range(30):
        ranks4.run(four_mebibytes)
    # 480 MiB were returned; allocators keep a few buffers of 4 MiB in each of six processes.
    assert resident() - before < 120


def test_progress_reaches_the_caller_and_leaves(
    ranks4: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(items: int) -> int:
        from stepmoe.launch import progress

        done = 0
        for _ in progress(range(items), desc="layers"):
            time.sleep(0.1)
            done += 1
        return done

    assert ranks4.run(work, 5) == [5] * 4
    assert capsys.readouterr().err == "", "short work shows no bar"
    assert ranks4.run(work, 30) == [30] * 4
    drawn = capsys.readouterr().err
    assert "layers" in drawn
    assert "/30" in drawn
    texts = drawn.split("\r")
    assert all(one != two for one, two in itertools.pairwise(texts)), "nothing is drawn twice"
    assert drawn.endswith("\r"), "the bar is wiped"
