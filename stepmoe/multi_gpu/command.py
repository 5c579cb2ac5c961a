"""`python -m stepmoe multi-gpu`: the plan on the GPUs of one host."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepmoe.command_checks import check_alone
from stepmoe.errors import ConfigError
from stepmoe.multi_gpu.machine import (
    NEEDS,
    assumed_setting,
    check_packages,
    describe_machine,
    remarks,
    setting_here,
)
from stepmoe.multi_gpu.plan import RANKS, Setting, Step, check_places, choose, steps_of
from stepmoe.multi_gpu.records import Record, check_folder, read_all
from stepmoe.multi_gpu.report import report
from stepmoe.multi_gpu.run import Finished, run_steps

_FOLDERS = {"flash": Path("notebooks/results/multi_gpu"), "tiny": Path("build/multi_gpu_rehearsal")}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `multi-gpu` command."""
    parser = subparsers.add_parser(
        "multi-gpu",
        help="tests and measurements on 2, 4 or 8 GPUs of one host, step by step, resumable",
        description="Test the variants on these GPUs, and measure collectives, prefill, decode and "
        "the recovery from a rank's death: step by step, one JSON file each (--list shows them). "
        f"Given again, it goes on where it stopped. Needs {NEEDS}. On any machine --device cpu "
        "--shape tiny runs such steps at small sizes: a rehearsal, which measures nothing.",
    )
    _add_arguments(parser)
    parser.set_defaults(run=_run)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_instead = parser.add_mutually_exclusive_group().add_argument
    add_instead("--list", "--dry-run", action="store_true", help="show the plan and run nothing")
    says = "say what the folder's results are, beside the predictions, and run nothing"
    add_instead("--report", action="store_true", help=says)
    add = parser.add_argument
    add(
        "--only", nargs="+", default=[], metavar="STEP", help="run these steps alone (default: all)"
    )
    again = "run also what is done: these steps, or, none named, all that are run"
    add("--again", nargs="*", metavar="STEP", help=again)
    budget = "start no step that would not end within so many (default: no limit)"
    add("--minutes", type=float, metavar="M", help=budget)
    ranks = "ranks, a GPU each (default: the most that there are GPUs for; on a CPU 2)"
    add("--tp", type=int, choices=RANKS, help=ranks)
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    shapes = "flash: the published model; tiny: a rehearsal (default: flash)"
    add("--shape", default="flash", choices=("flash", "tiny"), help=shapes)
    folders = f"default: {_FOLDERS['flash']}; of a rehearsal {_FOLDERS['tiny']}"
    add("--folder", type=Path, help=f"where the results are ({folders})")
    of_one = "one rank's recorded compute, to compare with: prefill --simulate-rank 0 --json FILE"
    add("--compute", type=Path, metavar="FILE", help=f"for --report: {of_one}")


def _run(args: argparse.Namespace) -> int:
    _check(args)
    if args.report:
        print(report(args.folder or _FOLDERS[args.shape], args.compute))
        return 0
    setting, here = _setting(args)
    folder = args.folder or _FOLDERS[setting.shape]
    plan = steps_of(setting)
    wanted = choose(plan, args.only, "--only")
    repeated = [] if args.again is None else choose(wanted, args.again, "--again")
    again = [step.name for step in repeated]
    known = read_all(folder, plan, setting, again) if here else {}
    left = [s for s in wanted if s.name not in known or not known[s.name].done]
    if not args.list:
        check_places(left)
        check_packages(left)
        check_folder(folder)
    print(_shown(setting, folder, wanted, known, left, args))
    if args.list or not left:
        return 0
    # Told to end, it ends the step first: its processes would keep the GPUs.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        finished = run_steps(left, folder, setting, describe_machine(setting), args.minutes)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on with the step that was running.")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return _ended(finished)


def _check(args: argparse.Namespace) -> None:
    check_alone()
    if args.minutes is not None and not args.minutes > 0:
        raise ConfigError(f"--minutes {args.minutes}: give more than 0")
    if args.folder and args.folder.is_file():
        raise ConfigError(f"--folder {args.folder} is a file: give a folder, there or not")
    if args.compute and not args.report:
        raise ConfigError(f"--compute {args.compute} is for --report: add that, or leave it out")


def _setting(args: argparse.Namespace) -> tuple[Setting, bool]:
    """What is to be run; and whether that is on this machine, or is only to be shown."""
    try:
        return setting_here(args.tp, args.device, args.shape), True
    except ConfigError as error:
        if not args.list:
            raise
        assumed = assumed_setting(args.tp or RANKS[-1])
        print(f"Nothing can be run here: {error}\nAssuming {assumed.ranks} x {assumed.gpu}.\n")
        return assumed, False


def _shown(
    setting: Setting,
    folder: Path,
    wanted: Sequence[Step],
    known: Mapping[str, Record],
    left: Sequence[Step],
    args: argparse.Namespace,
) -> str:
    """The plan, what is left of it, and how long that will take."""
    where = f"{setting.ranks} x {setting.gpu}" if setting.gpus else "CPU ranks"
    if setting.shares:
        where = f"{setting.ranks} ranks that share {setting.gpus or 'the cores'} ({where})"
    kind = "A rehearsal, whose times mean nothing" if setting.rehearsal else "The published shape"
    lines = [f"{kind}: {where}; results in {folder}", ""]
    for step in wanted:
        record = known.get(step.name)
        state = "to do" if record is None else record.run["status"]
        time = f"{step.estimate if record is None else record.run['seconds']:5.0f} s"
        lines.append(f"  {step.name:15} {state:15} {time}   {step.what}")
        if args.list:
            lines.append(f"{'':19}{step.typed}")
    seconds = sum(step.estimate for step in left)
    budget = f", of which at most {args.minutes:g} now" if args.minutes is not None else ""
    lines += [
        "",
        *remarks(setting),
        f"{len(left)} of {len(wanted)} steps left, about {seconds / 60:.0f} min{budget}.",
    ]
    return "\n".join(lines)


def _ended(finished: Finished) -> int:
    failed = [record.run["step"] for record in finished.records if not record.done]
    if failed:
        print(f"Not done: {', '.join(failed)}. Their files say why; the same command tries again.")
    if finished.left:
        print(f"No time for: {', '.join(finished.left)}. The same command goes on with them.")
    return 1 if failed else 0
