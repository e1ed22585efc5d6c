"""Activations that are no numbers any more: the model's own trouble, told where it begins."""

from torch import Tensor

from llmopt.errors import ModelError

OVERFLOW_HINT = "see whether transformers gives finite logits for the same text: the model overflows float32"


def require_finite(activations: Tensor, where: str) -> None:
    """See that what the quantized model computes are numbers.

    Raises:
        ModelError: they are NaN or infinite, at the place that `where` names.
    """
    if not bool(activations.isfinite().all()):
        raise ModelError("the quantized model's activations are NaN or infinite", where=where, hint=OVERFLOW_HINT)
