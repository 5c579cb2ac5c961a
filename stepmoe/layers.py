"""A choice of decoder layers in words: "3-6", "0,3-6"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepmoe.errors import ConfigError

_PART = re.compile(r"(\d+)(?:-(\d+))?")


def layer_numbers(chosen: str | Sequence[int]) -> tuple[int, ...]:
    """The numbers that a choice stands for, in its order: "0,3-5" is (0, 3, 4, 5).

    Raises:
        ConfigError: something else than numbers and ranges, no layer, or one twice.
    """
    numbers: list[int] = []
    for part in chosen.split(",") if isinstance(chosen, str) else map(str, chosen):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"layers {chosen!r}: give numbers and ranges, such as '3-6' or '0,3'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"layers {chosen!r}: {first}-{last} runs backwards")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ConfigError(f"layers {chosen!r}: name at least one layer, and none twice")
    return tuple(numbers)
