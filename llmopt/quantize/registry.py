"""The methods, by the names that people type. A method is imported when it is used: most of them need torch.

A fold may stand before a method, `smoothquant+gptq`; by itself it is followed by `search`. Behind a method may stand
`qat`, `reconstruct+qat`: what it made is trained; by itself that follows `gptq`.
"""

import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from llmopt.errors import UsageError, near_match

if TYPE_CHECKING:
    from llmopt.quantize.fold import Fold
    from llmopt.quantize.grid import ScaleRule
    from llmopt.quantize.method import Method

# Name, then where its class is.
METHODS: Mapping[str, str] = {
    "rtn": "llmopt.quantize.rtn:Rtn",
    "search": "llmopt.quantize.search:Search",
    "gptq": "llmopt.quantize.gptq:Gptq",
    "reconstruct": "llmopt.quantize.reconstruct:Reconstruct",
    "auto": "llmopt.quantize.auto:Auto",
}
FOLDS: Mapping[str, str] = {
    "awq": "llmopt.quantize.awq:Awq",
    "rotate": "llmopt.quantize.rotate:Rotate",
    "smoothquant": "llmopt.quantize.smoothquant:SmoothQuant",
}
JOIN = "+"
BEHIND_A_FOLD = "search"
TIMED = "auto"
TRAINED = "qat"
BEFORE_TRAINING = "gptq"


def check_method(name: str) -> None:
    """See that there is a method of that name.

    Raises:
        UsageError: there is none, or a method stands before another.
    """
    split(name)


def check_minutes(minutes: float | None, name: str) -> None:
    """See that a method can make something of the minutes that it is given, if it is given some.

    Raises:
        UsageError: it cannot, or there is no such method.
    """
    if minutes is None:
        return
    if not 0 < minutes < math.inf:
        raise UsageError(f"{minutes:g} minutes are no time to quantize in", hint="give more than 0, such as 10")
    if split(name)[1] != TIMED and not trains(name):
        raise UsageError(
            f"method {name} does the same in whatever time: only {TIMED} and {TRAINED} make do with some minutes",
            hint=f"method {TIMED}, or leave minutes out",
        )


def find_method(name: str, scales: "ScaleRule | None" = None) -> "Method":
    """The method of that name, with its default settings; its folds are left out. `scales` None: any will do.

    Raises:
        UsageError: there is none.
    """
    return cast("Method", _made(METHODS[split(name)[1]], **({} if scales is None else {"scales": scales})))


def find_folds(name: str) -> "tuple[Fold, ...]":
    """The folds that stand before the method, in their order.

    Raises:
        UsageError: there is no such method.
    """
    return tuple(cast("Fold", _made(FOLDS[fold])) for fold in split(name)[0])


def looks_at_inputs(name: str) -> bool:
    """Whether the method of that name cannot do without calibration text.

    Raises:
        UsageError: there is no such method.
    """
    return bool(split(name)[0]) or trains(name) or find_method(name).needs_inputs


def trains(name: str) -> bool:
    """Whether what the method of that name makes is trained."""
    return name.rsplit(JOIN, maxsplit=1)[-1] == TRAINED


def split(name: str) -> tuple[tuple[str, ...], str]:
    """A method's name as its folds, and what rounds behind them; whether that is trained is left out.

    Raises:
        UsageError: a part is not known, or not in its place.
    """
    if name == TRAINED:
        name = BEFORE_TRAINING
    *first, last = name.removesuffix(JOIN + TRAINED).split(JOIN)
    folds, method = (tuple(first), last) if last not in FOLDS else ((*first, last), BEHIND_A_FOLD)
    for part in (*folds, method):
        if part not in METHODS and part not in FOLDS:
            raise UsageError(f"there is no method {part!r}", hint=near_match(part, [*METHODS, *FOLDS, TRAINED]))
    misplaced = [part for part in folds if part not in FOLDS]
    if misplaced or len(set(folds)) < len(folds):
        raise UsageError(
            f"{name!r}: before the last {JOIN!r} stand folds, each once",
            hint=f"folds: {', '.join(FOLDS)}; methods: {', '.join(METHODS)}; such as smoothquant{JOIN}gptq",
        )
    return folds, method


def _made(place: str, **settings: object) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)(**settings)
