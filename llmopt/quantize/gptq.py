"""GPTQ: round column by column, and let the columns that are left make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), section 3. The error of the outputs is tr((W - Ŵ) H (W - Ŵ)ᵀ) with H the second moment of the
inputs; after rounding one column, the change of the others that makes it least is read off the Cholesky factor of H⁻¹.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.quantize.grid import ANY_SCALE, ScaleRule, find_grid, shrinks_to_try, without_dead_outliers
from llmopt.quantize.int8 import CENTER, LARGEST_SUM, quantize_rows
from llmopt.quantize.method import InputStatistics, Method, required
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight, spread

SMALLEST_HALF = 64  # of a triangle that is worth dividing
MOST_DAMPING = 10.0  # at which H is as good as diagonal, and GPTQ as good as rounding


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ with grids that are fixed beforehand, and columns in the order of their importance.

    Groups are those of the weight as it is stored, whatever the order of rounding, so an artifact needs no index of
    groups, for which engines leave their fast path. Grids are searched as in `search`.
    """

    damping: float = 0.01  # of the mean of H's diagonal; grows until H is positive definite
    block_columns: int = 128
    clip_steps: int = 16
    clip_range: float = 0.5
    scales: ScaleRule = ANY_SCALE
    name: str = "gptq"
    rows_are_independent: bool = True
    needs_inputs: bool = True
    refits_blocks: bool = False
    candidates: tuple[Method, ...] = ()

    def quantize(self, weight_OI: Tensor, scheme: Scheme, inputs: InputStatistics | None = None) -> QuantizedWeight:
        """Quantize one weight, [out, in] float32.

        Raises:
            LlmoptError: the second moment is not that of any inputs.
        """
        moment_II = required(inputs).second_moment_II
        weight_OI = without_dead_outliers(weight_OI, moment_II.diagonal(), scheme.group_size)
        grid = self._grid(weight_OI, scheme, moment_II.diagonal())
        order_I = torch.argsort(moment_II.diagonal(), descending=True, stable=True)
        factor_II = inverse_factor(moment_II[order_I][:, order_I], self.damping)
        codes_OI = _round_in_order(weight_OI, grid, order_I, factor_II, self.block_columns)
        return QuantizedWeight(
            scheme=scheme, codes_OI=codes_OI, scales_OG=grid.scales_OG, zero_points_OG=grid.zero_points_OG
        )

    def _grid(self, weight_OI: Tensor, scheme: Scheme, importance_I: Tensor) -> "_Grid":
        if scheme.activation_bits == 8:
            return _Grid(scheme, quantize_rows(weight_OI, scheme, self.scales).scales_OG, None)
        shrinks = shrinks_to_try(scheme, self.clip_range, self.clip_steps)
        return _Grid(scheme, *find_grid(weight_OI, scheme, shrinks, importance_I, self.scales))


@dataclass(frozen=True)
class _Grid:
    scheme: Scheme
    scales_OG: Tensor
    zero_points_OG: Tensor | None

    def spread(self, columns: int) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of every weight, [out, in]."""
        size = self.scheme.group_size or columns
        scales_OI = spread(self.scales_OG, size, columns)
        if self.zero_points_OG is None:
            return scales_OI, torch.full((1, 1), 2.0 ** (self.scheme.bits - 1)).expand_as(scales_OI)
        return scales_OI, spread(self.zero_points_OG, size, columns)


def inverse_factor(moment_II: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of H⁻¹ = Uᵀ U, [in, in] float32; computed in float64.

    H is `moment_II` with `damping` times the mean of its diagonal added to the diagonal, ten times as much for as long
    as it is not positive definite. Inputs that never were anything but 0 count as uncorrelated with all others.

    Raises:
        LlmoptError: it is not even so, or holds what is not a number.
    """
    moment_II = moment_II.double()
    mean = float(moment_II.diagonal().mean())
    if not bool(moment_II.isfinite().all()):
        raise LlmoptError("the inputs of a linear were not finite in calibration", hint="llmopt inspect the model")
    if mean == 0:
        return torch.eye(len(moment_II))
    while damping <= MOST_DAMPING:
        damped_II = moment_II.clone()
        damped_II.diagonal().add_(damping * mean)
        # With both axes turned round, H = R Rᵀ for an upper R, and so U = R⁻¹: H need not be inverted itself.
        lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
        if not failed:
            factor_II = inverse_of_upper(lower_II.flip(0, 1)).float()
            if bool(factor_II.isfinite().all()):
                return factor_II
        damping *= 10
    raise LlmoptError("the second moment of a linear's inputs is not positive definite", hint="give more text: --calib")


def inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: a third of the work of solving for the identity."""
    half = len(upper) // 2
    if half < SMALLEST_HALF:
        identity = torch.eye(len(upper), dtype=upper.dtype)
        solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return solved
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = first = inverse_of_upper(upper[:half, :half])
    inverse[half:, half:] = last = inverse_of_upper(upper[half:, half:])
    inverse[:half, half:] = -(first @ (upper[:half, half:] @ last))
    return inverse


def _round_in_order(weight_OI: Tensor, grid: _Grid, order_I: Tensor, factor_II: Tensor, block: int) -> Tensor:
    """Codes, uint8 [out, in], of columns that are rounded in the given order."""
    rows, columns = weight_OI.shape
    scales_OI, zeros_OI = (values[:, order_I].T.contiguous() for values in grid.spread(columns))
    # Columns lie in rows from here on: each is read and written as a whole. A copy, which the errors go into.
    left_IO = weight_OI[:, order_I].T.contiguous()
    codes_IO = torch.empty_like(left_IO)
    limits = _PairLimits(order_I, rows) if grid.scheme.activation_bits == 8 else None
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors_BO = torch.empty((stop - start, rows))
        for column in range(start, stop):
            scale_O, zero_O, value_O = scales_OI[column], zeros_OI[column], left_IO[column]
            code_O = (value_O / scale_O).round_().add_(zero_O)
            if limits is None:
                code_O.clamp_(0, grid.scheme.levels - 1)
            else:
                limits.apply(column, code_O)
            codes_IO[column] = code_O
            error_O = value_O.sub((code_O - zero_O) * scale_O).div_(factor_II[column, column])
            left_IO[column + 1 : stop].addr_(factor_II[column, column + 1 : stop], error_O, alpha=-1)
            errors_BO[column - start] = error_O
        left_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors_BO, alpha=-1)
    codes_OI = torch.empty((rows, columns), dtype=torch.uint8)
    codes_OI[:, order_I] = codes_IO.T.to(torch.uint8)
    return codes_OI


class _PairLimits:
    """Keeps neighbouring int8 codes from saturating (see `llmopt.quantize.int8`), in whatever order they come."""

    def __init__(self, order_I: Tensor, rows: int) -> None:
        self.order = order_I.tolist()
        self.first_of_pair: dict[int, Tensor] = {}
        self.rows = rows

    def apply(self, column: int, code_O: Tensor) -> None:
        """Clamp the codes of a column to what those of its neighbour leave, if it was before."""
        pair = self.order[column] // 2
        other_O = self.first_of_pair.pop(pair, None)
        if other_O is None:
            code_O.clamp_(0, 2 * CENTER - 1)
            self.first_of_pair[pair] = code_O.sub(CENTER)
            return
        low_O = (-LARGEST_SUM - other_O.clamp_max(0)).clamp_min_(-CENTER)
        high_O = (LARGEST_SUM - other_O.clamp_min(0)).clamp_max_(CENTER - 1)
        torch.clamp(code_O, low_O + CENTER, high_O + CENTER, out=code_O)
