"""One method tried on a weight: what it makes of it, and how much that errs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.pipeline.ranks import Ranks
from llmopt.quantize.auto import output_square
from llmopt.quantize.method import InputStatistics, Method
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight, split_rows, stack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a method made of a weight; the errors are ‖W - Ŵ‖ / ‖W‖, and ‖(W - Ŵ) x‖ / ‖W x‖ of held-out tokens.

    The second is None where no tokens were held out.
    """

    method: str
    weight: QuantizedWeight
    relative_error: float
    held_out_error: float | None


def try_joined(
    method: Method, weights: Sequence[Tensor], scheme: Scheme, inputs: InputStatistics, ranks: Ranks
) -> list[Trial]:
    """A method on weights, [out, in] each, that share their inputs: what it finds from these, it finds once."""
    assert method.rows_are_independent, method.name
    weight_OI = torch.cat(list(weights))
    shares = [share for share in ranks.shares(len(weight_OI)) if share.start < share.stop]
    found = ranks.spread(lambda rows: method.quantize(weight_OI[rows], scheme, inputs), shares)
    parts = split_rows(stack_rows(found), [len(weight) for weight in weights])
    # Each found by one process, for all: a choice among methods has to be the same everywhere.
    squares = ranks.spread(lambda place: _squares(weights[place], parts[place], inputs), range(len(parts)))
    return [_trial(method, part, square_4) for part, square_4 in zip(parts, squares, strict=True)]


def try_in_pieces(
    method: Method,
    read: Callable[[int], Tensor],
    starts: Sequence[int],
    scheme: Scheme,
    inputs: InputStatistics | None,
    *,
    ranks: Ranks,
) -> Trial:
    """A method on a weight of which `read` gives the rows from each start to the next."""

    def piece(start: int) -> tuple[QuantizedWeight, Tensor]:
        weight_OI = read(start)
        quantized = method.quantize(weight_OI, scheme, inputs)
        return quantized, _squares(weight_OI, quantized, inputs)

    pieces, squares = zip(*ranks.spread(piece, starts), strict=True)
    return _trial(method, stack_rows(list(pieces)), torch.stack(squares).sum(0))


def _squares(weight_OI: Tensor, quantized: QuantizedWeight, inputs: InputStatistics | None) -> Tensor:
    """‖W - Ŵ‖², ‖W‖²; the mean ‖(W - Ŵ) x‖² and ‖W x‖² of held-out tokens, or zeros if there are none."""
    error_OI = weight_OI - quantized.dequantize()
    found = [float(values_OI.square().sum(dtype=torch.float64)) for values_OI in (error_OI, weight_OI)]
    moment_II = None if inputs is None else inputs.held_out_II
    outputs = [0.0, 0.0] if moment_II is None else [output_square(one, moment_II) for one in (error_OI, weight_OI)]
    return torch.tensor([*found, *outputs], dtype=torch.float64)


def _trial(method: Method, weight: QuantizedWeight, squares_4: Tensor) -> Trial:
    error, size, output_error, output_size = squares_4.tolist()
    return Trial(
        method=method.name,
        weight=weight,
        relative_error=(error / size) ** 0.5 if size else 0.0,
        held_out_error=(output_error / output_size) ** 0.5 if output_size else None,
    )
