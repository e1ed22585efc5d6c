"""The methods, by the names that people type. A method is imported when it is used: most of them need torch."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from llmopt.errors import UsageError, near_match

if TYPE_CHECKING:
    from llmopt.quantize.method import Method

# Name, then where its class is.
METHODS: Mapping[str, str] = {
    "rtn": "llmopt.quantize.rtn:Rtn",
    "search": "llmopt.quantize.search:Search",
    "gptq": "llmopt.quantize.gptq:Gptq",
}


def check_method(name: str) -> None:
    """See that there is a method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}", hint=near_match(name, METHODS))


def find_method(name: str) -> "Method":
    """The method of that name, with its default settings.

    Raises:
        UsageError: there is none.
    """
    check_method(name)
    module, _, method = METHODS[name].partition(":")
    return cast("Method", getattr(importlib.import_module(module), method)())
