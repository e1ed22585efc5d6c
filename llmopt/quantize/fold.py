"""Folds: scales that move what is hard to round from the inputs of a linear into its weight, or out of it.

W x = (W diag(s)) (x / s). What makes x, a norm or another linear, divides by s in its own weights, so the model
computes the same as before and costs the same; only its roundings differ. Which s is best is searched by the error of
the outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmopt.quantize.execute import round_rows
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.search import Search

SMALLEST = 1e-5  # of the mean of what a scale is made from: a dead input has a scale as well
COARSE = Search(clip_steps=4)  # a fold is chosen by rounding many times; the grid is searched in full afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSample:
    """Some of the inputs of a linear, [tokens, in], and the largest magnitude of each among all tokens, [in]."""

    tokens_NI: Tensor
    largest_I: Tensor


@dataclass(frozen=True, slots=True)
class FoldedLinear:
    """A linear that reads folded inputs: its weight [out, in], and its scheme."""

    weight_OI: Tensor
    scheme: Scheme


class Fold(Protocol):
    """One way to make scales. Pure: tensors in, tensors out."""

    @property
    def name(self) -> str:
        """The word that people type and reports print."""
        ...

    def candidates(self, weight_OI: Tensor, inputs: InputSample) -> Iterator[Tensor]:
        """Scales [in] to try, for all linears that read these inputs, above one another."""
        ...


def best_scales(
    fold: Fold, linears: Sequence[FoldedLinear], inputs: InputSample, heads: tuple[int, int] | None = None
) -> Tensor | None:
    """Of the fold's candidates that which leaves the least squared error of the outputs, [in].

    None if no candidate is better than no fold. `heads` is (key-value heads, query heads of each) where inputs are
    values of heads: those that are mixed from the same values share their scales.
    """
    weight_OI = torch.cat([linear.weight_OI for linear in linears])
    best, least = None, output_error(linears, inputs, torch.ones(weight_OI.shape[1]))
    for scales_I in fold.candidates(weight_OI, inputs):
        shared_I = scales_I if heads is None else _shared(scales_I, *heads)
        error = output_error(linears, inputs, shared_I)
        if error < least:
            best, least = shared_I, error
    return best


def output_error(linears: Sequence[FoldedLinear], inputs: InputSample, scales_I: Tensor) -> float:
    """Σ (W x - Q(W s) Q(x / s))² over the sample, with activations rounded where the scheme says so."""
    folded_NI = inputs.tokens_NI / scales_I
    importance_I = folded_NI.square().mean(0)
    total = 0.0
    for linear in linears:
        rounded_OI = COARSE.round_to_grid(linear.weight_OI * scales_I, linear.scheme, importance_I).dequantize()
        seen_NI = round_rows(folded_NI) if linear.scheme.activation_bits == 8 else folded_NI
        difference_NO = seen_NI @ rounded_OI.T - inputs.tokens_NI @ linear.weight_OI.T
        total += float(difference_NO.square().sum(dtype=torch.float64))
    return total


def normalized(scales_I: Tensor) -> Tensor:
    """Scales whose largest and smallest lie equally far from 1: what they move up they move down as well."""
    return scales_I / (scales_I.max() * scales_I.min()).sqrt()


def _shared(scales_I: Tensor, kv_heads: int, group: int) -> Tensor:
    by_head = scales_I.log().view(kv_heads, group, -1)
    return by_head.mean(1, keepdim=True).expand_as(by_head).exp().reshape(-1)
