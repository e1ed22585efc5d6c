"""The formats, by the words that people type."""

from collections.abc import Mapping

from llmopt.errors import UsageError, near_match
from llmopt.pipeline.formats.base import Format
from llmopt.pipeline.formats.gptq import GPTQ
from llmopt.pipeline.formats.hf import HF
from llmopt.pipeline.formats.onnx import ONNX

FORMATS: Mapping[str, Format] = {known.name: known for known in (ONNX, HF, GPTQ)}


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}", hint=near_match(name, FORMATS))
    return FORMATS[name]
