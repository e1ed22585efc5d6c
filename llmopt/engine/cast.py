"""A checkpoint of mixed precision in transformers, on the CPU: every tensor in the dtype that the file has it in.

transformers loads all tensors in one dtype, and its modules take no inputs of another than their weights'. `open_cast`
loads them as stored and puts the casts in: a linear casts what it reads, a norm computes in float32 and gives what it
read or, if it is kept, float32. Sums are promoted by torch.
"""

from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llmopt.engine.base import Logits, TokenIds
from llmopt.engine.transformers import TransformersStream, opened
from llmopt.model.families import spec_from_config
from llmopt.model.json_file import read_object
from llmopt.model.safetensors_files import read_tables
from llmopt.model.spec import ModelSpec, Norm

CONFIG = "config.json"
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CastEngine:
    """The checkpoint in `folder` with `threads` threads, in float32 until `cast`; an `llmopt.engine.base.Engine`.

    Raises:
        ArtifactError: transformers cannot open the folder.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name = f"transformers {metadata.version('transformers')}"
        self._folder = folder
        self._model = opened(folder)
        self.vocab_size: int = self._model.get_output_embeddings().weight.shape[0]

    def cast(self) -> "CastEngine":
        """Go over to the dtypes of the file; gives itself."""
        put_casts(self._model, self._folder)
        return self

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, [batch, tokens, vocab_size]."""
        with torch.inference_mode():
            found = self._model(torch.from_numpy(ids_BT), use_cache=False).logits
        return cast("Logits", found.float().numpy())

    def stream(self, capacity: int) -> TransformersStream:
        """An empty sequence with room for `capacity` tokens."""
        return TransformersStream(self._model, capacity)


def open_cast(folder: Path) -> Any:
    """The transformers model of an artifact that `llmopt cast --format hf` wrote, each module in its own dtype.

    Raises:
        ArtifactError: transformers cannot open the folder.
    """
    model = opened(folder)
    put_casts(model, folder)
    return model


def put_casts(model: Any, folder: Path) -> None:
    """Give a model that was loaded in float32 the dtypes of the checkpoint in `folder`, and casts between them."""
    path = folder / CONFIG
    spec = spec_from_config(read_object(path), where=str(path))
    stored = {name: STORED[tensor.dtype] for name, tensor in read_tables(folder).items()}
    for table in (spec.embedding, spec.embedding.positions):
        if table is not None:
            model.get_submodule(table.name).to(stored[f"{table.name}.weight"])
    for linear in spec.linears():
        dtype = stored[linear.weight.name]
        module = model.get_submodule(linear.name).to(dtype)
        module.register_forward_pre_hook(partial(_cast_input, dtype))
    for block in spec.blocks:
        scope = block.attention.output.name.rpartition(".")[0]
        dtype = stored[block.attention.inputs[0].weight.name]
        model.get_submodule(scope).register_forward_pre_hook(partial(_cast_rotation, dtype), with_kwargs=True)
    for norm in _norms(spec):
        _wrap_norm(model.get_submodule(norm.name), stored[f"{norm.name}.weight"])


def _norms(spec: ModelSpec) -> list[Norm]:
    return [*(norm for block in spec.blocks for norm in block.norms()), spec.final_norm]


def _cast_input(dtype: torch.dtype, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(dtype), *args[1:])


def _cast_rotation(
    dtype: torch.dtype, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One table of cosines and sines serves all blocks, in the dtype of what enters the first."""
    if "position_embeddings" in kwargs:
        kwargs = kwargs | {"position_embeddings": tuple(table.to(dtype) for table in kwargs["position_embeddings"])}
    return args, kwargs


def _wrap_norm(module: Any, dtype: torch.dtype) -> None:
    """Have a norm, whose weight has few values, compute in float32, whatever it reads."""
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = inner(x.float())
        return y.to(torch.promote_types(x.dtype, dtype))

    module.forward = forward
