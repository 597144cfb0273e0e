"""Caches values that depend on files. A cache is valid during one command or one call of the Python interface."""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_clear: list[Callable[[], None]] = []


def cached_for_command(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that keeps the results of the last `maxsize` calls until `clear_caches` is called."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        cached = lru_cache(maxsize)(function)
        _clear.append(cached.cache_clear)
        return cached  # type: ignore[return-value]  # lru_cache has no parameter types

    return decorate


def clear_caches() -> None:
    """Empty all caches. This is necessary between commands, because files may have changed."""
    for clear in _clear:
        clear()
