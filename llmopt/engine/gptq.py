"""A GPTQ checkpoint read back as floats, by the definition of its layout and nothing that wrote it.

w[o, i] = scales[g, o] · (code[o, i] - (qzeros[g, o] + 1)) with g = g_idx[i]; codes lie in `qweight` along the inputs,
and zero points in `qzeros` along the outputs, the first of each word in its lowest bits.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from llmopt.model.json_file import read_object
from llmopt.model.safetensors_files import weight_files
from llmopt.model.spec import TensorSpec

WORD_BITS = 32


class GptqTensors:
    """Float32 tensors of the checkpoint in `folder`, by the names and shapes that the model has before quantization.

    Satisfies `llmopt.engine.torch.Tensors`. Use it as a context manager: it keeps the files open between reads.

    Raises:
        ModelError: a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._bits: int = read_object(folder / "config.json")["quantization_config"]["bits"]
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()

    def read(self, tensor: TensorSpec) -> Tensor:
        """One tensor, float32; what is quantized as the floats that its codes stand for, [out, in]."""
        if tensor.name in self._files:
            return self._get(tensor.name).float()
        layer = tensor.name.removesuffix(".weight")
        group_I = self._get(f"{layer}.g_idx").long()
        codes_OI = self._unpacked(self._get(f"{layer}.qweight").T)
        zeros_GO = self._unpacked(self._get(f"{layer}.qzeros")) + 1
        scales_GO = self._get(f"{layer}.scales").float()
        return (codes_OI - zeros_GO[group_I].T).float() * scales_GO[group_I].T

    def _get(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def _unpacked(self, words_RW: Tensor) -> Tensor:
        shifts = torch.arange(0, WORD_BITS, self._bits, dtype=torch.int32)
        values_RWS = (words_RW[..., None] >> shifts) & (2**self._bits - 1)
        return values_RWS.flatten(1)
