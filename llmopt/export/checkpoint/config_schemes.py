"""Which schemes a checkpoint of compressed-tensors is stored in, read from its config alone.

Groups name their linears by name, by `re:` and a regular expression, or by the class `Linear`; what is ignored is
named in the same ways. Whatever a scheme of llmopt does not say is refused: it would be computed as something else.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmopt.errors import ModelError, UnsupportedError, UsageError
from llmopt.model.spec import ModelSpec
from llmopt.quantize.scheme import Scheme, parse_scheme

METHOD = "compressed-tensors"
LINEAR = "Linear"
_REGEX = "re:"
_AGAIN = "llmopt quantize MODEL -o OUT --format hf writes what is read here"


def config_schemes(spec: ModelSpec, quantization: Mapping[str, Any], *, where: str) -> dict[str, Scheme]:
    """The scheme of each linear that has one, by name.

    Args:
        spec: the model.
        quantization: `quantization_config` of its config.
        where: what to call it.

    Raises:
        UnsupportedError: another program's format, or a scheme that llmopt has no word for.
        ModelError: it makes no sense.
    """
    method = quantization.get("quant_method")
    if method != METHOD:
        what = f"the weights are quantized by {method or 'an unknown method'}, and what is read here is {METHOD}"
        raise UnsupportedError(what, where=where, hint=_AGAIN)
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(name):
            raise UnsupportedError(f"the checkpoint has a {name}, which is not read", where=where, hint=_AGAIN)
    try:
        groups = [_group(name, group, quantization) for name, group in quantization["config_groups"].items()]
        ignored = list(quantization.get("ignore") or ())
        found = {linear.name: _scheme_of(linear.name, groups, ignored) for linear in spec.linears()}
    except (AttributeError, KeyError, TypeError, re.error) as error:
        raise ModelError(f"the quantization_config makes no sense: {error}", where=where) from error
    except (UnsupportedError, UsageError) as error:
        raise UnsupportedError(error.what, where=where, hint=_AGAIN) from error
    if spec.tied and found[spec.head.name] is not None:
        raise UnsupportedError(f"{spec.head.name} is tied to a float table, and is to be quantized", where=where)
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def _scheme_of(name: str, groups: Iterable[tuple[list[str], Scheme]], ignored: list[str]) -> Scheme | None:
    """Names and expressions go before the class; of those the first counts."""
    if any(_means(target, name) for target in ignored):
        return None
    by_class = None
    for targets, scheme in groups:
        if any(_means(target, name) for target in targets):
            return scheme
        if LINEAR in targets and by_class is None:
            by_class = scheme
    return by_class


def _means(target: str, name: str) -> bool:
    if target.startswith(_REGEX):
        return re.match(target.removeprefix(_REGEX), name) is not None
    return target == name


def _group(name: str, group: Mapping[str, Any], whole: Mapping[str, Any]) -> tuple[list[str], Scheme]:
    weights, activations = group["weights"], group.get("input_activations")
    rounds = activations is not None
    wanted = {
        "weights.type": (weights.get("type", "int"), "int"),
        "weights.dynamic": (bool(weights.get("dynamic")), False),
        "weights.actorder": (weights.get("actorder"), None),
        "output_activations": (group.get("output_activations"), None),
        "format": (group.get("format") or whole.get("format"), "int-quantized" if rounds else "pack-quantized"),
    }
    if activations is not None:
        asked = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        wanted |= {f"input_activations.{key}": (activations.get(key), value) for key, value in asked.items()}
    for key, (said, known) in wanted.items():
        if said != known:
            raise UnsupportedError(f"{name} has {key} {said!r}, where {known!r} is read")
    sizes = {"channel": "channel", "group": f"g{weights.get('group_size')}"}
    strategy = weights.get("strategy")
    if strategy not in sizes:
        raise UnsupportedError(f"{name} has weights.strategy {strategy!r}, where group and channel are read")
    symmetry = "sym" if weights.get("symmetric", True) else "asym"
    text = f"w{weights['num_bits']}a{8 if rounds else 16}-{sizes[strategy]}-{symmetry}"
    return list(group["targets"]), parse_scheme(text)
