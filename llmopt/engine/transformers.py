"""A checkpoint in transformers, float32 on the CPU: an artifact of compressed-tensors as its users open it.

transformers unpacks the weights on the first pass and computes in floats, so this shows what an artifact says and what
it takes there, not how fast vLLM is with it.
"""

import io
from contextlib import redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from llmopt.engine.base import Logits, TokenIds
from llmopt.errors import ArtifactError, UsageError

PACKAGE = "compressed_tensors"


def require_package() -> None:
    """See that transformers can open compressed-tensors.

    Raises:
        UsageError: a package is missing.
    """
    if find_spec(PACKAGE) is None:
        raise UsageError(
            "format hf is opened with compressed-tensors, which is missing", hint="pip install 'llmopt[hf]'"
        )


class TransformersEngine:
    """The checkpoint in `folder` with `threads` threads; satisfies `llmopt.engine.base.Engine`.

    Raises:
        UsageError: compressed-tensors is not installed.
        ArtifactError: transformers cannot open the folder.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        require_package()
        torch.set_num_threads(threads)
        self.name = f"transformers {metadata.version('transformers')}"
        self._model = opened(folder)
        self.vocab_size: int = self._model.get_output_embeddings().weight.shape[0]

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, [batch, tokens, vocab_size]."""
        with torch.inference_mode():
            found = self._model(torch.from_numpy(ids_BT), use_cache=False).logits
        return cast("Logits", found.numpy())

    def stream(self, capacity: int) -> "TransformersStream":
        """An empty sequence with room for `capacity` tokens."""
        return TransformersStream(self._model, capacity)

    def round_activations(self, on: bool) -> None:
        """Whether activations are rounded where a scheme says so."""
        for module in self._model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = on


class TransformersStream:
    """One sequence with its KV cache; satisfies `llmopt.engine.base.Stream`."""

    def __init__(self, model: Any, capacity: int) -> None:
        from transformers import DynamicCache  # noqa: PLC0415 (slow to import)

        self._model = model
        self._capacity = capacity
        self._length = 0
        self._cache = DynamicCache(config=model.config)

    def feed(self, ids_T: TokenIds) -> Logits:
        """Append tokens, [T], and give the logits behind the last one, [vocab_size].

        Raises:
            UsageError: the sequence grows past its capacity.
        """
        self._length += len(ids_T)
        if self._length > self._capacity:
            raise UsageError(f"the sequence has room for {self._capacity} tokens", hint="open it with more capacity")
        with torch.inference_mode():
            found = self._model(
                torch.from_numpy(ids_T)[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        return cast("Logits", found.logits[0, -1].float().numpy())


def opened(folder: Path) -> Any:
    """The model in float32.

    Raises:
        ArtifactError: transformers cannot open the folder.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (slow to import)

    # Both packages draw progress bars that no setting of theirs turns off; llmopt shows its own.
    with redirect_stderr(io.StringIO()):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        # What is wrong with a checkpoint may be any of theirs, torch's or safetensors' exceptions.
        except Exception as error:
            raise ArtifactError(f"transformers cannot open the checkpoint: {error}", where=str(folder)) from error
        model.train(False)
        with torch.inference_mode():
            model(torch.zeros((1, 1), dtype=torch.int64))  # unpacks the weights, which shows a bar as well
    return model
