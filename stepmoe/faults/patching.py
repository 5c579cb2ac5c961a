"""Injecting from outside: attributes replaced while a context is open, and put back exactly.

A fault is a generator of patches. Nothing in the library knows of faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Patch = tuple[Any, str, Any]  # owner (an object, a class or a module), attribute, replacement


@contextmanager
def replaced(patches: Iterable[Patch]) -> Iterator[None]:
    """Every attribute replaced inside the context; whatever happens in it, as before after it."""
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.callback(_restoring(owner, name))
            setattr(owner, name, value)
        yield


def _restoring(owner: Any, name: str) -> Callable[[], None]:
    """Puts the attribute back; one that the owner did not have itself is deleted again."""
    own = vars(owner)
    if name not in own:
        return lambda: delattr(owner, name)
    before = own[name]
    return lambda: setattr(owner, name, before)
