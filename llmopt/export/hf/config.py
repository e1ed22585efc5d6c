"""config.json with the `quantization_config` that transformers, vLLM and compressed-tensors read."""

from collections.abc import Mapping
from typing import Any

from llmopt.export.hf.pack import format_of
from llmopt.model.spec import ModelSpec
from llmopt.quantize.scheme import Scheme

MIXED = "mixed-precision"


def hf_config(config: Mapping[str, Any], spec: ModelSpec, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The model's own config, the dtype of what stays float said outright, and how each linear is stored.

    `schemes` has every linear by its module name; None stays float.
    """
    own = {name: value for name, value in config.items() if name not in {"torch_dtype", "dtype"}}
    return own | {"dtype": spec.dtype, "quantization_config": quantization_config(schemes)}


def quantization_config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Schemes by module name as compressed-tensors describes them, a group for each scheme."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(name)
    formats = {format_of(scheme) for scheme in by_scheme}
    alone = len(by_scheme) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": group(scheme, ["Linear"] if alone else names)
            for index, (scheme, names) in enumerate(by_scheme.items())
        },
        "ignore": [name for name, scheme in schemes.items() if scheme is None],
    }


def group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One scheme, and the modules that have it, by name or by class."""
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations if scheme.activation_bits == 8 else None,
        "output_activations": None,
        "format": format_of(scheme),
    }
