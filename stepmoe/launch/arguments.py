"""What goes into `Ranks` and `Ranks.run`, checked and packed, and what comes out."""

import importlib.util
import sys
import threading
from importlib.metadata import entry_points
from numbers import Real
from typing import Any

from stepmoe.checks import whole_number
from stepmoe.errors import ConfigError, RankError
from stepmoe.launch import rank

#: What `Ranks` needs beyond the library.
PACKAGES = ("ipyparallel", "cloudpickle", "psutil")
# Of what `ipyparallel.Cluster` takes, what says how processes are started; the rest `Ranks` says.
OPTIONS = (
    "config",
    "controller",
    "controller_args",
    "controller_ip",
    "controller_launcher_class",
    "controller_location",
    "delay",
    "send_engines_connection_env",
)


def checked(n: Any, device: str, engines: str, options: dict[str, Any]) -> int:
    """The arguments of `Ranks`, before anything starts; `n` as an int."""
    n = whole_number("n (ranks)", n)
    if engines == "local":
        rank.check_device(device)
    elif device not in rank.DEVICES:  # this host's GPUs say nothing about the others'
        raise ConfigError(f"device={device!r}: give one of {', '.join(rank.DEVICES)}")
    if not all(importlib.util.find_spec(name) for name in PACKAGES):
        raise ImportError(
            f"Ranks needs {', '.join(PACKAGES)}: pip install 'stepmoe[notebooks]'. "
            "Without them, run the same functions under torchrun (stepmoe.launch.init_distributed)"
        )
    known = sorted(point.name for point in entry_points(group="ipyparallel.engine_launchers"))
    if engines not in known:
        raise ConfigError(f"engines={engines!r}: ipyparallel knows {', '.join(known)}")
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(f"options: {name!r} is not known; give some of {', '.join(OPTIONS)}")
    return n


def check_call(fn: Any, timeout: Any) -> None:
    """Those of `Ranks.run` that are its own."""
    if not callable(fn):
        raise TypeError(f"fn={fn!r} is not callable: give the function, then its arguments")
    check_timeout(timeout)


def check_timeout(timeout: Any) -> None:
    """Raise ConfigError unless it is seconds that one can wait, or None."""
    if timeout is None:
        return
    is_number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConfigError(
            f"timeout={timeout!r:.40}: give seconds, more than 0 and at most "
            f"{threading.TIMEOUT_MAX:.0f}, or None for no limit"
        )


def packed(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """For the ranks; TypeError names what cannot be pickled."""
    from stepmoe.launch.worker import dumps

    _send_by_value(getattr(fn, "__module__", None))
    try:
        return dumps((fn, args, kwargs))
    except Exception as error:
        parts = [("fn", fn), *((f"argument {i}", value) for i, value in enumerate(args, 1))]
        for name, value in [*parts, *kwargs.items()]:
            try:
                dumps(value)
            except Exception as reason:
                raise TypeError(
                    f"{name} ({type(value).__name__}) cannot be sent to the ranks: {reason}"
                ) from None
        raise TypeError(f"the arguments cannot be sent to the ranks: {error}") from None


def _send_by_value(module: str | None) -> None:
    """Let functions of a module travel whole if an import by its name would find another or none.

    Such is a module loaded from a file outside sys.path (importlib's spec_from_file_location).
    """
    import cloudpickle

    name = (module or "").partition(".")[0]
    loaded = sys.modules.get(name)
    if loaded is None or name in ("__main__", "stepmoe"):  # what travels whole anyway, or never
        return
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    found = next((spec for spec in specs if spec), None)
    if found is None or found.origin != getattr(
        getattr(loaded, "__spec__", None), "origin", found.origin
    ):
        cloudpickle.register_pickle_by_value(loaded)


def unpacked(values: list[bytes]) -> list[Any]:
    """The results, in rank order."""
    import cloudpickle

    results = []
    for number, value in enumerate(values):
        try:
            results.append(cloudpickle.loads(value))
        except Exception as error:
            raise RankError(
                f"the result of rank {number} cannot be read here: {type(error).__name__}: {error}",
                rank=number,
            ) from error
    return results
