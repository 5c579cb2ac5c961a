"""Fault: what one bug is, where it applies and how it is put into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.faults.patching import Patch, replaced
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import LAYERS

Applies = Callable[[str, ParallelConfig, Step3p5Config], bool]


@dataclass(frozen=True)
class Published:
    """What the thread reports: accuracy on GSM8K, from 0 to 1, with the bug and without it.

    Attributes:
        right: None where the thread does not say.
    """

    wrong: float
    right: float | None
    source: str


@dataclass(frozen=True)
class Fault:
    """A bug that really happened, to be injected into a model.

    Attributes:
        name: key in FAULTS.
        what: the mistake, in one line.
        thread: where it happened, and what was said of it there.
        where: the settings it can occur in, in words; `applies` decides.
        signature: what it does to the values.
        guard: the one that stops it, or finds it out, with all guards on.
        caught_by: those that find it wherever it applies; which others do depends on the setting.
        shown_in: variant and layout in which its signature is plainest.
        published: accuracy figures of the thread, if it has some.
    """

    name: str
    what: str
    thread: str
    where: str
    signature: str
    guard: str
    caught_by: frozenset[str]
    shown_in: tuple[str, ParallelConfig]
    applies: Applies = field(repr=False)
    patches: Callable[[Step3p5ForCausalLM], Iterable[Patch]] = field(repr=False)
    published: Published | None = None

    def inject(self, model: Step3p5ForCausalLM) -> AbstractContextManager[None]:
        """A context in which `model`, of this rank, has the fault; every rank has to enter it.

        Raises:
            ConfigError: the fault cannot occur in a model of this variant, layout or shape.
        """
        variant = variant_of(model)
        if not self.applies(variant, model.parallel, model.config):
            raise ConfigError(
                f"{self.name} cannot occur with variant={variant!r} and {model.parallel}: "
                f"it needs {self.where}"
            )
        return replaced(self.patches(model))


def variant_of(model: Step3p5ForCausalLM) -> str:
    """The name in sm.VARIANTS; ConfigError for a class of one's own, which no fault knows."""
    for name, layer in LAYERS.items():
        if model.layer_class is layer:
            return name
    name = model.layer_class.__name__
    raise ConfigError(f"the lab's faults are written for {', '.join(LAYERS)}, not for {name}")
