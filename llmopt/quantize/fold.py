"""Folds: changes of basis that move what is hard to round from the inputs of a linear into its weight, or out of it.

W x = (W A) (A⁻¹ x). What makes x, a norm or another linear, has A⁻¹ multiplied into its own weights, so the model
computes the same as before and costs the same; only its roundings differ. Which A is best is searched by the error of
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

# (key-value heads, query heads of each) where inputs are values of heads: those mixed from the same change alike.
Heads = tuple[int, int]


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


class Change(Protocol):
    """One A."""

    def of_weight(self, weight_OI: Tensor) -> Tensor:
        """W A."""
        ...

    def of_inputs(self, tokens_NI: Tensor) -> Tensor:
        """A⁻¹ x of some tokens."""
        ...

    def of_maker(self, rows: Tensor, heads: Heads | None) -> Tensor:
        """A⁻¹ times what makes the inputs: a weight's rows or a vector, one for each input, or for each value."""
        ...


@dataclass(frozen=True, slots=True)
class Scaling:
    """A = diag(s)."""

    scales_I: Tensor

    @classmethod
    def shared(cls, scales_I: Tensor, heads: Heads | None) -> "Scaling":
        """The geometric mean of what is asked for inputs that can only be scaled alike."""
        if heads is None:
            return cls(scales_I)
        by_head = scales_I.log().view(*heads, -1)
        return cls(by_head.mean(1, keepdim=True).expand_as(by_head).exp().reshape(-1))

    def of_weight(self, weight_OI: Tensor) -> Tensor:
        """See `Change`."""
        return weight_OI * self.scales_I

    def of_inputs(self, tokens_NI: Tensor) -> Tensor:
        """See `Change`."""
        return tokens_NI / self.scales_I

    def of_maker(self, rows: Tensor, heads: Heads | None) -> Tensor:
        """See `Change`; values are made once for all query heads that read them."""
        scales = self.scales_I if heads is None else self.scales_I.view(*heads, -1)[:, 0].reshape(-1)
        return rows / scales.view(-1, *[1] * (rows.ndim - 1))


@dataclass(frozen=True, slots=True)
class Turning:
    """A has the same orthogonal matrix, [channels, channels], for each head."""

    turn_DD: Tensor

    def of_weight(self, weight_OI: Tensor) -> Tensor:
        """See `Change`."""
        return (weight_OI.reshape(len(weight_OI), -1, len(self.turn_DD)) @ self.turn_DD).flatten(-2)

    def of_inputs(self, tokens_NI: Tensor) -> Tensor:
        """See `Change`: Rᵀ x, and x is a row."""
        return self.of_weight(tokens_NI)

    def of_maker(self, rows: Tensor, heads: Heads | None) -> Tensor:
        """See `Change`."""
        by_head = rows.reshape(-1, len(self.turn_DD), rows[0].numel())
        return (self.turn_DD.T @ by_head).view_as(rows)


class Fold(Protocol):
    """One way to make changes. Pure: tensors in, tensors out."""

    @property
    def name(self) -> str:
        """The word that people type and reports print."""
        ...

    def candidates(self, weight_OI: Tensor, inputs: InputSample, heads: Heads | None) -> Iterator[Change]:
        """Changes to try, for all linears that read these inputs, above one another."""
        ...


def best_change(
    fold: Fold, linears: Sequence[FoldedLinear], inputs: InputSample, heads: Heads | None = None
) -> Change | None:
    """Of the fold's candidates that which leaves the least squared error of the outputs.

    None if no candidate is better than no fold.
    """
    outputs = exact_outputs(linears, inputs)
    best, least = None, output_error(linears, inputs, None, outputs)
    for change in fold.candidates(torch.cat([linear.weight_OI for linear in linears]), inputs, heads):
        error = output_error(linears, inputs, change, outputs)
        if error < least:
            best, least = change, error
    return best


def exact_outputs(linears: Sequence[FoldedLinear], inputs: InputSample) -> list[Tensor]:
    """W x of each linear and the sample, [tokens, out]."""
    return [inputs.tokens_NI @ linear.weight_OI.T for linear in linears]


def output_error(
    linears: Sequence[FoldedLinear], inputs: InputSample, change: Change | None, outputs: Sequence[Tensor]
) -> float:
    """Σ (W x - Q(W A) Q(A⁻¹ x))² over the sample, with activations rounded where the scheme says so; A = 1 if None.

    `outputs` are the exact ones, W x of each linear, [tokens, out].
    """
    tokens_NI = inputs.tokens_NI if change is None else change.of_inputs(inputs.tokens_NI)
    importance_I = tokens_NI.square().mean(0)
    total = 0.0
    for linear, exact_NO in zip(linears, outputs, strict=True):
        weight_OI = linear.weight_OI if change is None else change.of_weight(linear.weight_OI)
        rounded_OI = COARSE.round_to_grid(weight_OI, linear.scheme, importance_I).dequantize()
        seen_NI = round_rows(tokens_NI) if linear.scheme.activation_bits == 8 else tokens_NI
        total += float((seen_NI @ rounded_OI.T).sub_(exact_NO).square_().sum(dtype=torch.float64))
    return total


def normalized(scales_I: Tensor) -> Tensor:
    """Scales whose largest and smallest lie equally far from 1: what they move up they move down as well."""
    return scales_I / (scales_I.max() * scales_I.min()).sqrt()
