"""Does the exported graph compute what the quantized model computes? Tokens run through both, and a mismatch fails.

The reference runs in torch while the parts pass by, so it costs one block of memory. The graph is opened twice: at
accuracy level 0, where both sides compute in float32 and must agree to rounding, and as it ships, where integer
kernels round activations as well; that difference is reported.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import RotaryTables, block_forward, embed, head_logits
from llmopt.engine.ort import OrtEngine
from llmopt.errors import VerificationError
from llmopt.export.onnx.levels import at_level
from llmopt.measure.tokens import score
from llmopt.model.spec import Block, ModelSpec
from llmopt.pipeline.parts import Weights
from llmopt.quantize.execute import quantized_apply
from llmopt.quantize.weights import QuantizedWeight

# Relative error of the logits, ‖Δ‖ / ‖logits‖. Float32 on both sides differs by about 1e-6. Where activations are
# rounded, a value halfway between two codes may fall either way, and what follows moves with it; a wrong graph
# differs by 0.1 and more.
FLOAT_TOLERANCE = 1e-3
INT8_TOLERANCE = 5e-2
LEVEL_0_GRAPH = ".level0.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two computations of the same logits: relative error, share of equal most likely tokens, mean KL in nats."""

    relative_error: float
    top1_agreement: float
    kl_divergence: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The export against the quantized model in torch: in float32 where it can be, and as it ships."""

    exact: Agreement
    shipped: Agreement


class Reference:
    """The quantized model's hidden states, carried along as the parts come by."""

    def __init__(self, spec: ModelSpec, windows: list[TokenIds]) -> None:
        self.spec = spec
        self.windows = windows
        self.tables = RotaryTables(spec, max(len(ids) for ids in windows))
        self.hidden: list[Tensor] = []
        self.int8_activations = False
        self.head_weights: Weights = {}

    @torch.inference_mode()
    def embedding(self, weights: Weights) -> None:
        """Look the tokens up in the table as it is stored."""
        table = f"{self.spec.embedding.name}.weight"
        plain = {name: as_tensor(weight) for name, weight in weights.items() if name == table or weight is not None}
        self.hidden = [embed(self.spec.embedding, plain, torch.from_numpy(ids)[None]) for ids in self.windows]

    @torch.inference_mode()
    def block(self, block: Block, weights: Weights) -> None:
        """Run one block."""
        self._note(weights)
        norms = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        for index, hidden in enumerate(self.hidden):
            turn = self.tables.turn(block, 0, hidden.shape[1])
            apply = partial(quantized_apply, weights)
            self.hidden[index] = block_forward(block, norms, hidden, turn, apply=apply)

    def head(self, weights: Weights) -> None:
        """Keep what `logits` needs."""
        self._note(weights)
        self.head_weights = weights

    @torch.inference_mode()
    def logits(self, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Logits of one window, [tokens, vocab_size]."""
        norms = {name: weight for name, weight in self.head_weights.items() if isinstance(weight, Tensor)}
        apply = partial(quantized_apply, self.head_weights)
        return head_logits(self.spec, norms, self.hidden[index], apply=apply)[0].numpy()

    def _note(self, weights: Weights) -> None:
        quantized = (weight for weight in weights.values() if isinstance(weight, QuantizedWeight))
        self.int8_activations |= any(weight.scheme.activation_bits == 8 for weight in quantized)


def as_tensor(weight: Tensor | QuantizedWeight) -> Tensor:
    """The weight that is stored, as float32."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def verify(folder: Path, reference: Reference, threads: int) -> Verification:
    """Hold the graph in `folder` against the reference.

    Raises:
        VerificationError: it computes something else.
    """
    exact_graph = at_level(folder, 0, LEVEL_0_GRAPH)
    try:
        exact = compare(OrtEngine(exact_graph, threads), reference)
    finally:
        exact_graph.unlink()
    tolerance = INT8_TOLERANCE if reference.int8_activations else FLOAT_TOLERANCE
    if not exact.relative_error <= tolerance:
        raise VerificationError(
            f"the exported graph's logits differ from the quantized model's by {exact.relative_error:.2g} "
            f"(relative; {tolerance:g} is allowed), top-1 agreement {exact.top1_agreement:.2%}",
            hint="this is a defect of llmopt or of the installed onnxruntime: please report it with this message",
        )
    return Verification(exact=exact, shipped=compare(OrtEngine(folder, threads), reference))


def compare(engine: OrtEngine, reference: Reference) -> Agreement:
    """Both sides' logits on the reference's windows."""
    squared_error = squared_norm = kl = agree = 0.0
    tokens = sum(len(ids) for ids in reference.windows)
    for index, ids in enumerate(reference.windows):
        expected, actual = reference.logits(index), engine.logits(ids[None])[0]
        squared_error += float(np.square(actual - expected, dtype=np.float64).sum())
        squared_norm += float(np.square(expected, dtype=np.float64).sum())
        scores = score(expected, actual, ids)
        kl += float(scores.kl.sum())
        agree += float(scores.agree.sum())
    return Agreement(
        relative_error=(squared_error / squared_norm) ** 0.5,
        top1_agreement=agree / tokens,
        kl_divergence=kl / tokens,
        tokens=tokens,
    )
