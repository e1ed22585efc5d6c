"""Quantized weights in the first layout of AutoGPTQ, which every reader of GPTQ knows.

Of each linear: `qweight` int32 [in · bits / 32, out], the first input in the lowest bits; `scales` float16
[groups, out]; `qzeros` int32 [groups, out · bits / 32], each zero point less one; `g_idx` int32 [in], the group of
each input, which counts up evenly where inputs keep their order.

A zero point of 0 has no place in `qzeros` (less one, it wraps round, and readers differ in what they make of that), so
the schemes are symmetric. The config names one scheme for all linears of the blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt import __version__
from llmopt.errors import UsageError
from llmopt.export.checkpoint.files import Entry
from llmopt.export.checkpoint.rules import Assignments, quantized, require_divisible, require_linears
from llmopt.model.spec import Linear, ModelSpec
from llmopt.quantize.pack import pack_words
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight

FORMAT = "gptq"
WORD_BITS = 32
DTYPE = torch.float16  # of scales, and of all that is not quantized: ExLlama's kernels have no other
MULTIPLE = 32  # of which ExLlama's kernels ask inputs and outputs to be


@dataclass(frozen=True, slots=True)
class Gptq:
    """One weight's tensors."""

    def entries(self, linear: Linear, scheme: Scheme) -> Iterator[Entry]:
        """See `Packing`."""
        name, rows, columns = linear.name, linear.out_features, linear.in_features
        groups = columns // (scheme.group_size or columns)
        yield Entry(f"{name}.qweight", torch.int32, (columns * scheme.bits // WORD_BITS, rows))
        yield Entry(f"{name}.qzeros", torch.int32, (groups, rows * scheme.bits // WORD_BITS))
        yield Entry(f"{name}.scales", DTYPE, (groups, rows))
        yield Entry(f"{name}.g_idx", torch.int32, (columns,))

    def tensors(self, linear: Linear, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See `Packing`."""
        name, bits = linear.name, weight.scheme.bits
        columns = weight.codes_OI.shape[1]
        zeros_GO = torch.full(weight.scales_OG.T.shape, 2 ** (bits - 1) - 1, dtype=torch.uint8)
        return {
            f"{name}.qweight": pack_words(weight.codes_OI, bits).T.contiguous(),
            f"{name}.qzeros": pack_words(zeros_GO, bits),
            f"{name}.scales": weight.scales_OG.T.to(DTYPE).contiguous(),
            f"{name}.g_idx": torch.arange(columns, dtype=torch.int32) // (weight.scheme.group_size or columns),
        }


def require(spec: ModelSpec, assignments: Assignments) -> None:
    """See that the layout, and the engines that read it, can hold these schemes.

    Raises:
        LlmoptError: they cannot.
    """
    require_linears(spec, FORMAT)
    scheme = only_scheme(spec, assignments)
    if scheme.activation_bits == 8 or not scheme.symmetric:
        raise UsageError(
            f"format {FORMAT} holds symmetric weights with float activations, which {scheme.name} has not",
            hint="w4a16-sym or w8a16, or --format hf",
        )
    for linear, _ in quantized(spec, assignments):
        require_divisible(linear, scheme, inputs=MULTIPLE, outputs=MULTIPLE)


def only_scheme(spec: ModelSpec, assignments: Assignments) -> Scheme:
    """The one scheme of all linears in blocks.

    Raises:
        UsageError: they have several, or some have none.
    """
    schemes = {assignments[linear.name].scheme for block in spec.blocks for linear in block.linears()}
    names = sorted("none" if scheme is None else scheme.name for scheme in schemes)
    first = schemes.pop()
    if schemes or first is None:
        raise UsageError(
            f"format {FORMAT} has one scheme for all linears of the blocks; these have {' and '.join(names)}",
            hint="leave --override and --ignore out, or take --format hf",
        )
    return first


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """What `config.json` says of the quantized weights, and `quantize_config.json`, where older readers look."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmopt:{__version__}"]},
    }
