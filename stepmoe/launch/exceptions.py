"""An exception in a rank: described as plain data, and its frames emptied."""

import re
import time
import traceback

from stepmoe.launch.answers import Failure, Frame

# What a rank sees when another one closed their connection, in gloo's words or NCCL's: never the
# cause.
_CONSEQUENCE = re.compile(
    r"closed by (remote )?peer|reset by peer|broken pipe|failed to recv, got 0 bytes"
    r"|ncclRemoteError|remote process exited",
    re.IGNORECASE,
)
# What a reader takes in: endless recursion has a thousand frames, a loop that tries again as many
# causes.
_ENDS = 10  # frames at either end of a stack
_DEPTH = 10  # exceptions behind or inside one another
_MEMBERS = 5  # of a group


def describe(error: BaseException, caller: str) -> Failure:
    """The exception, those it was raised from, and the members of a group.

    Args:
        caller: the file that called the user's function; its frames are left out.
    """
    return _describe(error, caller, frozenset())


def clear(error: BaseException) -> None:
    """Empty the frames that tracebacks hold: their variables keep process groups alive."""
    left: list[BaseException | None] = [error]
    seen = set()
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [one.__cause__, one.__context__, *_members(one)]


def _describe(error: BaseException, caller: str, seen: frozenset[int]) -> Failure:
    """`seen`: ids of the exceptions that led here, which may refer to each other in a circle."""
    seen |= {id(error)}
    text = "".join(traceback.format_exception_only(error)).strip()
    frames = _frames(error, caller)
    parent = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if parent is not None and id(parent) in seen:
        parent = None
    too_deep = len(seen) == _DEPTH
    members = [_describe(one, caller, seen) for one in _members(error)[:_MEMBERS] if not too_deep]
    by_peer = isinstance(error, RuntimeError) and bool(_CONSEQUENCE.search(text))
    return Failure(
        name=type(error).__name__,
        text=text,
        frames=frames[:_ENDS] + frames[_ENDS:][-_ENDS:],
        skipped=max(0, len(frames) - 2 * _ENDS),
        consequence=by_peer or (bool(members) and all(one.consequence for one in members)),
        time=time.time(),
        parent=_describe(parent, caller, seen) if parent is not None and not too_deep else None,
        parent_skipped=parent is not None and too_deep,
        members=members,
        members_skipped=len(_members(error)) - len(members),
    )


def _frames(error: BaseException, caller: str) -> list[Frame]:
    return [
        Frame(entry.filename, entry.lineno or 0, entry.name, entry.line or "")
        for entry in traceback.extract_tb(error.__traceback__)
        if entry.filename != caller
    ]


def _members(error: BaseException) -> tuple[BaseException, ...]:
    return error.exceptions if isinstance(error, BaseExceptionGroup) else ()
