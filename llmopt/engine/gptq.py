"""A GPTQ checkpoint read back as floats, by the definition of its layout and nothing that wrote it.

w[o, i] = scales[g, o] · (code[o, i] - (qzeros[g, o] + 1)) with g = g_idx[i]. Codes lie in `qweight` along the inputs,
zero points in `qzeros` along the outputs, the first of each word in its lowest bits: so GPTQModel's `TorchLinear`
unpacks them.
"""

from contextlib import ExitStack
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
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        for path in weight_files(folder):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, tensor: TensorSpec) -> Tensor:
        """One tensor, float32; what is quantized as the floats that its codes stand for, [out, in]."""
        if tensor.name in self._file_of:
            return self._stored(tensor.name).float()
        layer = tensor.name.removesuffix(".weight")
        group_I = self._stored(f"{layer}.g_idx").long()
        codes_OI = self._unpacked(self._stored(f"{layer}.qweight").T)
        zeros_GO = self._unpacked(self._stored(f"{layer}.qzeros")) + 1
        scales_GO = self._stored(f"{layer}.scales").float()
        weight_OI: Tensor = (codes_OI - zeros_GO[group_I].T) * scales_GO[group_I].T
        return weight_OI

    def _stored(self, name: str) -> Tensor:
        found: Tensor = self._file_of[name].get_tensor(name)
        return found

    def _unpacked(self, words_RW: Tensor) -> Tensor:
        """Rows of words as rows of the values in them."""
        shifts_V = torch.arange(0, WORD_BITS, self._bits, dtype=torch.int32)
        values_RWV: Tensor = (words_RW[..., None] >> shifts_V) & (2**self._bits - 1)
        return values_RWV.flatten(1)
