"""The methods, by the names that people type."""

import difflib
from collections.abc import Mapping

from llmopt.errors import UsageError
from llmopt.quantize.method import Method
from llmopt.quantize.rtn import Rtn

METHODS: Mapping[str, Method] = {"rtn": Rtn()}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(METHODS)}"
        raise UsageError(f"there is no method {name!r}", hint=known)
    return METHODS[name]
