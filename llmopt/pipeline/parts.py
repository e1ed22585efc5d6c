"""The model in parts, embedding first and head last: read, quantized, and handed on one at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.model.checkpoint import Checkpoint
from llmopt.model.spec import Linear, ModelSpec, TensorSpec
from llmopt.quantize.assign import Assignment
from llmopt.quantize.method import Method
from llmopt.quantize.weights import QuantizedWeight, stack_rows
from llmopt.report.results import LayerResult

# Weights in flight while a table is quantized: rounding holds a few temporaries of this size.
CHUNK_WEIGHTS = 1 << 22

Weights = dict[str, Tensor | QuantizedWeight]


@dataclass(frozen=True, slots=True)
class Part:
    """Some tensors by their checkpoint names, linears as [out, in], and what became of each layer among them."""

    weights: Weights
    layers: tuple[LayerResult, ...]


class PartReader:
    """Reads a checkpoint part by part and quantizes what is assigned a scheme. `method` None quantizes nothing."""

    def __init__(
        self, spec: ModelSpec, checkpoint: Checkpoint, assignments: Mapping[str, Assignment], method: Method | None
    ) -> None:
        self.spec = spec
        self.checkpoint = checkpoint
        self.assignments = assignments
        self.method = method

    def embedding(self) -> Part:
        """The token table, and learned positions."""
        embedding = self.spec.embedding
        table, *others = embedding.tensors()
        weight, layer = self._quantized(embedding.name, table, transposed=False)
        weights: Weights = {table.name: weight, **self._read(others)}
        return Part(weights, (layer,))

    def blocks(self) -> Iterator[Part]:
        """Each block."""
        for block in self.spec.blocks:
            norms = [tensor for norm in block.norms() for tensor in norm.tensors()]
            yield self._part(norms, list(block.linears()))

    def head(self, embedding: Part) -> Part:
        """The final norm and the head; a tied head takes the table out of the embedding's part."""
        head, norm = self.spec.head, list(self.spec.final_norm.tensors())
        if not self.spec.tied:
            return self._part(norm, [head])
        table = embedding.weights[head.weight.name]
        bias = list(head.tensors())
        layer = self._result(head.name, table, embedding.layers[0].relative_error)
        return Part({head.weight.name: table, **self._read([*norm, *bias])}, (layer,))

    def _part(self, others: list[TensorSpec], linears: list[Linear]) -> Part:
        weights, layers = self._read(others), []
        for linear in linears:
            weight, layer = self._quantized(linear.name, linear.weight, transposed=linear.transposed)
            weights[linear.weight.name] = weight
            layers.append(layer)
            weights |= self._read([tensor for tensor in linear.tensors() if tensor != linear.weight])
        return Part(weights, tuple(layers))

    def _read(self, tensors: list[TensorSpec]) -> Weights:
        return {tensor.name: self.checkpoint.read(tensor) for tensor in tensors}

    def _quantized(
        self, name: str, tensor: TensorSpec, *, transposed: bool
    ) -> tuple[Tensor | QuantizedWeight, LayerResult]:
        scheme = self.assignments[name].scheme
        if self.method is None or scheme is None:
            weight = self.checkpoint.read(tensor)
            plain = weight.T.contiguous() if transposed else weight
            return plain, self._result(name, plain, None)
        if transposed or not self.method.rows_are_independent:
            weight = self.checkpoint.read(tensor)
            weight = weight.T.contiguous() if transposed else weight
            quantized = self.method.quantize(weight, scheme)
            return quantized, self._result(name, quantized, quantized.relative_error(weight))
        rows, columns = tensor.shape
        step = max(1, CHUNK_WEIGHTS // columns)
        chunks, error, norm = [], 0.0, 0.0
        for start in range(0, rows, step):
            weight = self.checkpoint.read_rows(tensor, start, min(rows, start + step))
            chunks.append(self.method.quantize(weight, scheme))
            error += float((weight - chunks[-1].dequantize()).square().sum(dtype=torch.float64))
            norm += float(weight.square().sum(dtype=torch.float64))
        quantized = stack_rows(chunks)
        return quantized, self._result(name, quantized, (error / norm) ** 0.5 if norm else 0.0)

    def _result(self, name: str, weight: Tensor | QuantizedWeight, error: float | None) -> LayerResult:
        reason = self.assignments[name].reason
        if not isinstance(weight, QuantizedWeight):
            return LayerResult(name=name, scheme=None, method=None, reason=reason or "not quantized")
        assert self.method is not None
        scheme, method = weight.scheme.name, self.method.name
        return LayerResult(name=name, scheme=scheme, method=method, reason=reason, relative_error=error)
