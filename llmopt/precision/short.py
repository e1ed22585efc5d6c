"""The dtypes that a model can be cast to, by the words that people type; and how much may be lost. Nothing heavy."""

from llmopt.errors import UsageError

FP16, BF16, FP32 = "fp16", "bf16", "fp32"
SHORT = (FP16, BF16)
WORDS = {FP16: "float16", BF16: "bfloat16", FP32: "float32"}  # as configs of transformers have them
TOLERANCE = 0.01  # of the relative error of what a module gives


def check_dtype(name: str) -> None:
    """See that a dtype is one to cast to.

    Raises:
        UsageError: it is not.
    """
    if name not in SHORT:
        raise UsageError(f"there is no dtype {name!r} to cast to", hint=f"--dtype {' or '.join(SHORT)}")


def check_tolerance(tolerance: float) -> None:
    """See that some error is allowed, and not any.

    Raises:
        UsageError: it is not so.
    """
    if not 0 < tolerance < 1:
        raise UsageError(f"a tolerance of {tolerance:g} is no share of 1", hint="--tolerance 0.01")
