"""From a Hugging Face config to a `ModelSpec`: one file a family, found by what it declares.

A family module offers `FAMILY`, a `Family`. Adding one is adding its file; `tests/model/test_families.py` holds each
against transformers' own implementation.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from llmopt.errors import ModelError, UnsupportedError, near_match
from llmopt.model.spec import ModelSpec

Config = Mapping[str, Any]
FromGguf = Callable[[str, np.ndarray[Any, Any], Config], np.ndarray[Any, Any]]


def _unchanged(name: str, tensor: np.ndarray[Any, Any], config: Config) -> np.ndarray[Any, Any]:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family is described. `from_gguf(name, tensor, config)` undoes what the GGUF converter did to a tensor."""

    name: str
    model_types: tuple[str, ...]
    spec: Callable[[Config], ModelSpec]
    from_gguf: FromGguf = _unchanged


@cache
def families() -> Mapping[str, Family]:
    """Every family, by `model_type`."""
    modules = (importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__))
    found = (module.FAMILY for module in modules if hasattr(module, "FAMILY"))
    return {model_type: family for family in found for model_type in family.model_types}


def family_of(config: Config, *, where: str) -> Family:
    """The family that understands `config`.

    Raises:
        ModelError: the config names no `model_type`.
        UnsupportedError: no family here knows that type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError("the config names no model_type", where=where, hint="is this a Hugging Face model folder?")
    known = families()
    if model_type not in known:
        what = f"model_type {model_type!r} is not supported"
        raise UnsupportedError(what, where=where, hint=near_match(model_type, sorted(known), likeness=0.8))
    return known[model_type]


def spec_from_config(config: Config, *, where: str = "config.json") -> ModelSpec:
    """Describe the model that a Hugging Face config (as a mapping) stands for.

    Raises:
        ModelError: a key that the family needs is missing or makes no sense.
        UnsupportedError: the family, or something that the config asks for, is not supported.
    """
    family = family_of(config, where=where)
    try:
        return family.spec(config)
    except KeyError as error:
        raise ModelError(f"the config lacks {error.args[0]!r}", where=where) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"the config makes no sense: {error}", where=where) from error
    except UnsupportedError as error:
        raise UnsupportedError(error.what, where=error.where or where, hint=error.hint) from error
