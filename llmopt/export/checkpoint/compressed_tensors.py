"""Quantized weights as the compressed-tensors package stores them: what transformers, vLLM and SGLang open.

Formats `pack-quantized` (integer weights, float activations) and `int-quantized` (both in 8 bits), as in
`compressed_tensors.compressors` 0.20; `mixed-precision` at the top where a model has both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import UsageError
from llmopt.export.checkpoint.files import Entry
from llmopt.export.checkpoint.rules import (
    Assignments,
    quantized,
    require_divisible,
    require_float_tables,
    require_fused_alike,
    require_linears,
)
from llmopt.model.spec import Linear, ModelSpec
from llmopt.quantize.int8 import CENTER
from llmopt.quantize.pack import pack_words
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

FORMAT = "hf"
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """One weight's tensors. Scales have the dtype that the model computes in, for engines would make them so."""

    scale_dtype: torch.dtype

    def entries(self, linear: Linear, scheme: Scheme) -> Iterator[Entry]:
        """See `Packing`."""
        name, rows, columns = linear.name, linear.out_features, linear.in_features
        groups = columns // (scheme.group_size or columns)
        if scheme.activation_bits == 8:
            yield Entry(f"{name}.weight", torch.int8, (rows, columns))
        else:
            yield Entry(f"{name}.weight_packed", torch.int32, (rows, ceil(columns * scheme.bits / WORD_BITS)))
            yield Entry(f"{name}.weight_shape", torch.int64, (2,))
        yield Entry(f"{name}.weight_scale", self.scale_dtype, (rows, groups))
        if not scheme.symmetric:
            yield Entry(f"{name}.weight_zero_point", torch.int32, (ceil(rows * scheme.bits / WORD_BITS), groups))

    def tensors(self, linear: Linear, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Packing`."""
        name, bits = linear.name, weight.scheme.bits
        scales = {f"{name}.weight_scale": weight.scales_OG.to(self.scale_dtype)}
        if weight.scheme.activation_bits == 8:
            return scales | {f"{name}.weight": (weight.codes_OI.to(torch.int16) - CENTER).to(torch.int8)}
        found = scales | {
            f"{name}.weight_packed": pack_words(weight.codes_OI, bits),
            f"{name}.weight_shape": torch.tensor(weight.codes_OI.shape),
        }
        if weight.zero_points_OG is not None:  # packed along the rows
            zeros_GO = pack_words(weight.zero_points_OG.T.contiguous(), bits)
            found[f"{name}.weight_zero_point"] = zeros_GO.T.contiguous()
        return found


def require(spec: ModelSpec, assignments: Assignments) -> None:
    """See that the format, and the engines that read it, can hold these schemes.

    Raises:
        LlmoptError: they cannot; see `rules`.
    """
    require_linears(spec, FORMAT)
    require_float_tables(spec, assignments, FORMAT)
    require_fused_alike(spec, assignments)
    for linear, scheme in quantized(spec, assignments):
        in_a_word = 1 if scheme.activation_bits == 8 else WORD_BITS // scheme.bits
        require_divisible(linear, scheme, inputs=in_a_word, outputs=1 if scheme.symmetric else in_a_word)
    _require_loadable({scheme for _, scheme in quantized(spec, assignments)})


def _require_loadable(schemes: set[Scheme]) -> None:
    """transformers 5 unpacks weights with zero points as if all had the first scheme of the config.

    Raises:
        UsageError: there are others.
    """
    asymmetric = sorted(scheme.name for scheme in schemes if not scheme.symmetric)
    if asymmetric and len(schemes) > 1:
        raise UsageError(
            f"format {FORMAT} holds {asymmetric[0]} as the only scheme, for transformers opens no mixture with it; "
            f"there are {', '.join(sorted(scheme.name for scheme in schemes))}",
            hint="symmetric schemes mix: w4a16-sym, w8a16, w8a8",
        )


def quantization_config(spec: ModelSpec, assignments: Assignments) -> dict[str, Any]:
    """What config.json says of the quantized weights. One scheme is that of all linears but those ignored; of several,
    each names its own.
    """
    names: dict[Scheme, list[str]] = {}
    for linear, scheme in quantized(spec, assignments):
        names.setdefault(scheme, []).append(linear.name)
    groups = {
        f"group_{index}": _group(scheme, ["Linear"] if len(names) == 1 else targets)
        for index, (scheme, targets) in enumerate(names.items())
    }
    formats = {group["format"] for group in groups.values()}
    # transformers 5 cannot place packed zero points in a module, but unpacks them while it loads if it is told to.
    unpack = {} if all(scheme.symmetric for scheme in names) else {"dequantize": True}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [linear.name for linear in spec.linears() if assignments[linear.name].scheme is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **unpack,
    }


def _group(scheme: Scheme, targets: list[str]) -> Mapping[str, Any]:
    integer = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    where = {"strategy": "group" if scheme.group_size else "channel", "group_size": scheme.group_size}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "format": "int-quantized" if scheme.activation_bits == 8 else "pack-quantized",
        "weights": {**integer, **where, "actorder": None},
        "input_activations": activations if scheme.activation_bits == 8 else None,
        "output_activations": None,
    }
