"""From stored bytes to float32: the plain floating-point types of both formats, and the block types of GGUF."""

from functools import cache

import numpy as np
import torch

from llmopt.errors import ModelError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHECKED_AT_ONCE = 1 << 22  # values


@cache
def decodable(dtype: str) -> bool:
    """Whether `decode` understands a dtype. Integers are not weights, and FP8 weights need scales from elsewhere."""
    if dtype in _FLOATS:
        return True
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # noqa: PLC0415 (only GGUF files need it)

    if dtype not in GGMLQuantizationType.__members__:
        return False
    kind = GGMLQuantizationType[dtype]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def decode(raw_RB: torch.Tensor, dtype: str) -> torch.Tensor:
    """Rows of bytes, uint8 [rows, bytes a row], as float32 [rows, values a row].

    `dtype` must be `decodable`. The result may share memory with `raw_RB`.
    """
    if dtype in _FLOATS:
        return raw_RB.view(_FLOATS[dtype]).to(torch.float32)
    from gguf import GGMLQuantizationType, dequantize  # noqa: PLC0415 (only GGUF files need it)

    # A block whose scale is not finite gives values that are not: `require_finite` names them, numpy need not warn.
    with np.errstate(all="ignore"):
        values_RV: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = dequantize(
            raw_RB.numpy(), GGMLQuantizationType[dtype]
        )
    return torch.from_numpy(values_RV)


def require_finite(values: torch.Tensor, *, name: str, file: str, first_row: int = 0) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: naming the tensor, how many of its values are wrong, and the index of the first. The index counts
            from the start of the tensor, of which `values` begin at row `first_row`.
    """
    flat, count, first = values.reshape(-1), 0, None
    for start in range(0, flat.numel(), _CHECKED_AT_ONCE):
        part = flat[start : start + _CHECKED_AT_ONCE]
        # Extremes are not finite when any value is not, and cost a tenth of the time that `isfinite` takes.
        if torch.stack(part.aminmax()).isfinite().all():
            continue
        wrong = (~part.isfinite()).nonzero()
        count += len(wrong)
        first = start + int(wrong[0]) if first is None else first
    if first is None:
        return
    row, *rest = (int(index) for index in np.unravel_index(first, values.shape))
    what = f"{name} holds NaN or infinity: {count} of {flat.numel()} values, the first at {[row + first_row, *rest]}"
    raise ModelError(what, where=file, hint="get the checkpoint again; if it is the same, the model itself is broken")
