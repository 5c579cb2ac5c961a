"""What a stretch of code asks of a GPU: memory and kernels, noted and not run."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations of torch that reserve memory or describe it in another way, and launch nothing.
_NO_KERNEL = {"empty", "new_empty", "empty_like", "_unsafe_view", "promote_types"}


class Noted(TorchDispatchMode):
    """Notes what torch is asked for while it is on.

    Attributes:
        peak: bytes of the tensors made while it is on, the most that were alive at once, as far as
            can be seen between two operations.
        kernels: the operations that launch one on a GPU, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.kernels = 0, list[str]()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {k: made for k, made in self._made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            self.kernels.append(name)
        return made


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
