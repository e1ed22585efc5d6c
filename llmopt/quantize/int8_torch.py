"""Products of 8-bit weights and 8-bit activations by torch's own integer kernel, on x86 CPUs.

A row's codes are c = round(x / step) + zero, so that x̂ = step (c - zero), and with codes q and scales s of a weight

    y[t, o] = step[t] · s[o] · (Σᵢ c[t, i] q[o, i] - zero[t] Σᵢ q[o, i]) + b[o].

The kernel gives the first sum; it is exact for the weights of `llmopt.quantize.int8`. It is FBGEMM's, which torch means
to remove: oneDNN's, which stays, takes six times as long for a single row without VNNI.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from llmopt.quantize.execute import SMALLEST_TOP, TOP
from llmopt.quantize.int8 import CENTER
from llmopt.quantize.weights import QuantizedWeight

_ENGINES = ("x86", "fbgemm")
_SUMMED_AT_ONCE = 256  # rows
PADDED_TO = 512  # inputs, as the kernel packs them: 576 take the memory of 1024


def available() -> bool:
    """Whether this build of torch has the kernel."""
    return torch.backends.quantized.engine in _ENGINES and hasattr(torch, "_make_per_channel_quantized_tensor")


class Int8Product:
    """A weight of scheme w8a8, packed for the kernel; computes what `quantized_apply` does with `round_rows`.

    With `symmetric`, as it does with `round_rows_symmetric`: a row's largest magnitude is 127.5 steps.
    """

    def __init__(self, weight: QuantizedWeight, *, symmetric: bool = False) -> None:
        assert weight.scheme.activation_bits == 8
        self._symmetric = symmetric
        codes_OI = (weight.codes_OI ^ CENTER).view(torch.int8)  # around 0; the topmost bit is the sign
        rows = len(codes_OI)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it will be removed
            stored = torch._make_per_channel_quantized_tensor(
                codes_OI, torch.ones(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64), 0
            )
        self._packed = torch.ops.quantized.linear_prepack(stored, None)
        self._scales_O = weight.scales_OG[:, 0].float()
        # Some rows at a time: torch makes 32 bits of all codes that it adds up.
        self._sums_O = torch.cat(
            [part.sum(1, dtype=torch.int32) for part in torch.split(codes_OI, _SUMMED_AT_ONCE)]
        ).float()
        self.nbytes = codes_OI.nbytes + self._scales_O.nbytes + self._sums_O.nbytes

    def __call__(self, x: Tensor, agree: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The product of rounded activations, [..., in] to [..., out], without a bias.

        Where these are only some of the inputs, `agree` gives the largest of these values, [..., 2], of all of them.
        """
        ends = torch.cat([-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)], -1)
        ends = ends if agree is None else agree(ends)
        step, zero = _symmetric_grid(ends) if self._symmetric else _grid(ends)
        codes = (x / step).round_().add_(zero).clamp_(0, TOP)
        sums: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(codes, 1.0, 0, self._packed)
        return sums.addcmul_(zero, self._sums_O, value=-1).mul_(step).mul_(self._scales_O)


def _grid(ends: Tensor) -> tuple[Tensor, Tensor]:
    """A step, and the code of 0, of rows from -ends[0] to ends[1]; see `round_rows`."""
    low, high = -ends[..., :1].clamp_min(0), ends[..., 1:].clamp_min(SMALLEST_TOP)
    return (low - high) * (-1 / TOP), (low / (low - high) / (1 / TOP)).round()


def _symmetric_grid(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The same around the middle of the codes; see `round_rows_symmetric`."""
    step = ends.amax(-1, keepdim=True).clamp_min(SMALLEST_TOP) / (TOP / 2)
    return step, torch.full_like(step, CENTER)
