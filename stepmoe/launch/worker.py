"""What the notebook calls in a rank: set it up, run a function, let go of a failed call.

Nothing in here raises to ipyparallel: a call answers with an `Answer`, so that the notebook can
tell the rank that failed from those that merely lost it.
"""

import gc
import importlib
import io
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from types import FrameType, ModuleType
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

# The defaults of its functions hold the world group of the moment it is imported. Building a model
# imports it; done here, before there is a group, it keeps none alive when this rank lets go.
import torch.distributed.nn.functional

from stepmoe.launch import exceptions, progress_bar, rank
from stepmoe.launch.answers import Answer, Setup
from stepmoe.launch.deadline import Deadline, publish


@dataclass
class _Rank:
    """The state of this process as a rank; `epoch` is that of its process group."""

    setup: Setup | None = None
    epoch: int = -1
    store: Any = None
    in_call: bool = False
    interrupted: bool = False
    deadline: Deadline = field(default_factory=Deadline)


_me = _Rank()

_NOT_FOUND = (
    "The ranks look for modules where sys.path pointed when they were started: after a change of "
    "it call ranks.restart()"
)


def hello() -> tuple[str, int, int]:
    """This engine's host, process id and number of GPUs."""
    return socket.gethostname(), os.getpid(), torch.cuda.device_count()


def serve() -> str:
    """Start a store that ranks on other hosts can reach; "host:port"."""
    host = socket.getfqdn()
    _me.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return f"{host}:{_me.store.port}"


def set_up(setup: Setup) -> None:
    """Become a rank. Comes before any `execute`."""
    _me.setup = setup
    os.umask(setup.umask)
    rank.prepare_rank(setup.rank, setup.world, setup.local_rank, setup.ranks_here, setup.device)
    if setup.one_host:
        rank.use_loopback()
    if setup.rank == 0:
        progress_bar.sink = lambda report: publish({"progress": report})
    _me.deadline.start()


def execute(payload: bytes, epoch: int, timeout: float | None) -> Answer:
    """Run the pickled (function, arguments, keyword arguments) in this rank.

    Args:
        epoch: counts the process groups; a new one is made when it differs from the last call's.
        timeout: seconds until this rank reports where it is and stops waiting.
    """
    signal.signal(signal.SIGINT, _on_interrupt)
    _me.interrupted = False
    failure = None
    try:
        try:
            _me.in_call = True
            _me.deadline.begin(timeout)
            _join(epoch)
            function, args, kwargs = _loads(payload)
            value = function(*args, **kwargs)
        finally:
            _me.in_call = False
    except BaseException as error:
        failure = exceptions.describe(error, caller=__file__)
        exceptions.clear(error)
    finally:
        where = _me.deadline.end()
    if _me.interrupted:  # what was raised since is no cause, what was returned came too late
        let_go()
        return Answer(interrupted=where)
    if failure is None:
        return _pack(value)
    let_go()
    return Answer(failure=failure)


def let_go() -> None:
    """Forget groups and state, so that peers that wait for this rank fail instead."""
    signal.signal(signal.SIGINT, _on_interrupt)  # ignores one that comes too late
    rank.state.clear()
    _me.epoch = -1
    if _me.setup and _me.setup.keep_groups:
        return
    if dist.is_initialized():
        rank.leave()
    gc.collect()  # the connections close with the last reference to a group


def dumps(value: Any) -> bytes:
    """Pickle, functions and classes of a notebook by value, tensors on a GPU as CPU tensors.

    Of a view only what it shows is sent: two views of one tensor arrive as two tensors.
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor:
            if obj.is_cuda:
                return obj.detach().cpu().__reduce_ex__(2)
            if _shows_a_part(obj):
                return obj.detach().clone().requires_grad_(obj.requires_grad).__reduce_ex__(2)
        # cloudpickle ships the submodules whose names a function mentions, and knows only plain
        # modules; torch.distributed.config, say, is of a subclass.
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType:
            name = obj.__name__
            if sys.modules.get(name) is obj:
                return importlib.import_module, (name,)
        return super().reducer_override(obj)


def _shows_a_part(tensor: torch.Tensor) -> bool:
    """Whether the memory that would be pickled is more than the tensor's numbers."""
    if tensor.layout is not torch.strided or vars(tensor):  # a clone would lose its attributes
        return False
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize


def _join(epoch: int) -> None:
    """Make the process group of this epoch, unless this rank is in it."""
    setup = _me.setup
    assert setup is not None
    if epoch == _me.epoch:
        return
    if dist.is_initialized():
        rank.leave()
    dist.init_process_group(
        setup.backend, store=_store(setup, epoch), rank=setup.rank, world_size=setup.world
    )
    _me.epoch = epoch


def _has_left() -> bool:
    """Whether the function destroyed the group of its epoch, which cannot be joined again."""
    assert _me.setup is not None
    return not dist.is_initialized() or dist.get_world_size() != _me.setup.world


def _store(setup: Setup, epoch: int) -> Any:
    if setup.one_host:
        return dist.FileStore(f"{setup.rendezvous}-{epoch}", setup.world)  # type: ignore[attr-defined]
    if _me.store is None:
        host, port = setup.rendezvous.rsplit(":", 1)
        _me.store = dist.TCPStore(host, int(port), is_master=False)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"epoch {epoch}", _me.store)  # type: ignore[attr-defined]


def _on_interrupt(signum: int, frame: FrameType | None) -> None:
    """Stop the function, once: gloo lets a late signal through when nothing runs any more."""
    if _me.in_call:
        _me.in_call = False
        _me.interrupted = True
        raise KeyboardInterrupt


def _loads(payload: bytes) -> Any:
    try:
        return cloudpickle.loads(payload)
    except ModuleNotFoundError as error:
        error.add_note(_NOT_FOUND)
        raise


def _pack(value: Any) -> Answer:
    try:
        return Answer(value=dumps(value), left=_has_left())
    except Exception as error:
        return Answer(unsendable=f"{type(value).__qualname__} ({type(error).__name__}: {error})")
