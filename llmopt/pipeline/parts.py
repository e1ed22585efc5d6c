"""The model in parts, embedding first and head last: read, quantized, and handed on one at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.pipeline.calibration import Calibration, Weights
from llmopt.pipeline.folding import fold_block
from llmopt.pipeline.journal import EMBEDDING, HEAD, Part, PartJournal, block_name
from llmopt.pipeline.ranks import ALONE
from llmopt.pipeline.reconstruct import Reconstruction
from llmopt.pipeline.spill import States
from llmopt.quantize.assign import Assignment
from llmopt.quantize.fold import Fold
from llmopt.quantize.method import InputStatistics, Method
from llmopt.quantize.reconstruct import RECONSTRUCT
from llmopt.quantize.registry import JOIN
from llmopt.quantize.rotate import Rotate
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight, split_rows, stack_rows
from llmopt.report.results import LayerResult

# Weights in flight while a table is quantized: rounding holds a few temporaries of this size.
CHUNK_WEIGHTS = 1 << 22
EXACT_BITS = 8
BEFORE_HEAD = "float32: it carries the last norm's gain through the rotation, which the tied table has no place for"


def fits_table(spec: ModelSpec, scheme: Scheme | None, method: Method) -> bool:
    """Whether a table is fitted to what enters the head that it serves as too; at 8 bits there is nothing to gain."""
    return spec.tied and method.needs_inputs and scheme is not None and scheme.bits < EXACT_BITS


class PartReader:
    """Reads a checkpoint part by part and quantizes what is assigned a scheme. `method` None quantizes nothing.

    A method that needs inputs gets them from the `calibration`, which the parts pass through; so do `folds`, which
    scale the weights of a block before they are quantized. A table is rounded to nearest, for it has no inputs; but one
    that serves as the head is fitted to those of the head. Parts that a `journal` has are not made again; those that it
    lacks are put there. What is `turned`, the checkpoint has turned already.

    Several processes read the same parts, each with the calibration's own `ranks`: the rows are divided among them, and
    all end with the same weights. The first of them has the journal.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Tensors,
        assignments: Mapping[str, Assignment],
        method: Method | None,
        calibration: Calibration | None = None,
        *,
        folds: Sequence[Fold] = (),
        journal: PartJournal | None = None,
        turned: bool = False,
    ) -> None:
        assert calibration is not None or not folds
        self.spec = spec
        self.checkpoint = checkpoint
        self.assignments = assignments
        self.method = method
        self.calibration = calibration
        self.folds = folds
        self.journal = journal
        self.turned = turned
        self.ranks = ALONE if calibration is None else calibration.ranks
        self.reconstruction = None
        if calibration is not None and method is not None and method.refits_blocks:
            self.reconstruction = Reconstruction(calibration, method.scales)
        self.folded: dict[str, Tensor] = {}  # of the block at hand; linears as [out, in]
        self.folds_of: dict[str, list[str]] = {}

    def embedding(self) -> Part:
        """The token table, and learned positions."""
        part = self._kept(EMBEDDING, self._made_embedding)
        if self.calibration is not None:
            self.calibration.embedding(part.weights)
        if self.reconstruction is not None:
            self.reconstruction.embedding(self._stored(self.spec.embedding.tensors()))
        return part

    def blocks(self) -> Iterator[Part]:
        """Each block."""
        for block in self.spec.blocks:
            yield self._kept(block_name(block.index), partial(self._made_block, block), partial(self._passed, block))

    def head(self, embedding: Part) -> Part:
        """The final norm and the head; a tied head takes the table out of the embedding's part."""
        if not self.spec.tied:
            return self._kept(HEAD, self._made_head)
        head, part = self.spec.head, self._entering_head()
        part.weights[head.weight.name] = embedding.weights[head.weight.name]
        part.weights.update(self._read(list(head.tensors())))
        shared = embedding.layers[0]
        part.layers.append(replace(shared, name=head.name, reason=self.assignments[head.name].reason or shared.reason))
        return part

    def _entering_head(self) -> Part:
        part = Part(self._read(list(self.spec.tensors_before_head())), [])
        if self.spec.before_head is not None:
            part.layers.append(
                LayerResult(name=self.spec.before_head.name, scheme=None, method=None, reason=BEFORE_HEAD)
            )
        return part

    def _inputs_of_tied_head(self) -> InputStatistics | None:
        """What a table that serves as the head is fitted to."""
        scheme = self.assignments[self.spec.embedding.name].scheme
        if self.calibration is None or self.method is None or not fits_table(self.spec, scheme, self.method):
            return None
        return self.calibration.head_in_float(self._stored)

    def _stored(self, tensors: Iterable[TensorSpec]) -> dict[str, Tensor]:
        return {tensor.name: self.checkpoint.read(tensor) for tensor in tensors}

    def _kept(self, name: str, make: Callable[[], Part], replay: Callable[[Part], None] | None = None) -> Part:
        """A part out of the journal, replayed, or else made and put there."""
        part = self.ranks.of_first(lambda: None if self.journal is None else self.journal.read(name))
        if part is None:
            part = make()
            if self.journal is not None:
                self.journal.write(name, part)
        elif replay is not None:
            replay(part)
        return part

    def _passed(self, block: Block, part: Part) -> None:
        if self.calibration is not None:
            self.calibration.block(block, part.weights, None)
        if self.reconstruction is not None:
            self.reconstruction.follow(block, self._floats(block))

    def _made_embedding(self) -> Part:
        embedding = self.spec.embedding
        table, *others = embedding.tensors()
        weight, layer = self._quantized(embedding.name, table, transposed=False, inputs=self._inputs_of_tied_head())
        return Part({table.name: weight, **self._read(others)}, [layer])

    def _made_block(self, block: Block) -> Part:
        self._fold(block)
        part = Part(self._read([tensor for norm in block.norms() for tensor in norm.tensors()]), [])
        if self.calibration is None:
            self._add(part, list(block.linears()), None)
        else:
            entering = None if self.reconstruction is None else self.reconstruction.entering()
            self.calibration.block(block, part.weights, partial(self._add, part))
            if self.reconstruction is not None and entering is not None:
                self._refit(self.reconstruction, block, part, entering)
        return part

    def _refit(self, reconstruction: Reconstruction, block: Block, part: Part, entering: States) -> None:
        """Have a block learn from the float one; its layers say so, if that made it better."""
        floats = self.folded or self._floats(block)
        reconstruction.follow(block, floats)
        if not reconstruction.refit(block, part.weights, floats, entering):
            return
        for index, (layer, linear) in enumerate(zip(part.layers, block.linears(), strict=True)):
            weight = part.weights[linear.weight.name]
            if isinstance(weight, QuantizedWeight):
                error = weight.relative_error(floats[linear.weight.name])
                part.layers[index] = replace(layer, method=f"{layer.method}{JOIN}{RECONSTRUCT}", relative_error=error)

    def _made_head(self) -> Part:
        part = self._entering_head()
        inputs = None if self.calibration is None else self.calibration.head(part.weights)
        self._add(part, [self.spec.head], inputs)
        return part

    def _fold(self, block: Block) -> None:
        """Have the weights of a block folded; from then on they are read as they were left."""
        self.folded, self.folds_of = {}, {}
        if not self.folds:
            return
        assert self.calibration is not None
        floats = self._floats(block)
        for fold in self.folds:
            samples = self.calibration.look(block, floats)
            for name in fold_block(fold, block, floats, samples, self._scheme_of, ranks=self.ranks):
                self.folds_of.setdefault(name, []).append(fold.name)
        self.folded = floats

    def _floats(self, block: Block) -> dict[str, Tensor]:
        """A block as it is stored, but linears as [out, in]."""
        floats = self._stored(block.tensors())
        for linear in block.linears():
            if linear.transposed:
                floats[linear.weight.name] = floats[linear.weight.name].T.contiguous()
        return floats

    def _scheme_of(self, linear: Linear) -> Scheme | None:
        return self.assignments[linear.name].scheme

    def _add(self, part: Part, linears: Sequence[Linear], inputs: InputStatistics | None) -> None:
        """Read linears that share their inputs into a part; those of one scheme are fitted to them as one weight."""
        for scheme, group in groupby(linears, key=lambda linear: self.assignments[linear.name].scheme):
            alike = list(group)
            if inputs is None or scheme is None or self.method is None:
                found = [self._quantized(one.name, one.weight, transposed=one.transposed) for one in alike]
            else:
                found = self._fitted(alike, scheme, self.method, inputs)
            for linear, (weight, layer) in zip(alike, found, strict=True):
                part.weights[linear.weight.name] = weight
                part.layers.append(layer)
                part.weights.update(self._read([tensor for tensor in linear.tensors() if tensor != linear.weight]))

    def _fitted(
        self, linears: Sequence[Linear], scheme: Scheme, method: Method, inputs: InputStatistics
    ) -> list[tuple[Tensor | QuantizedWeight, LayerResult]]:
        """What a method makes of linears above one another: what it finds from their inputs, it finds once."""
        assert method.rows_are_independent, method.name
        weights = [self._read_linear(linear.weight, transposed=linear.transposed) for linear in linears]
        weight_OI = torch.cat(weights)
        shares = [share for share in self.ranks.shares(len(weight_OI)) if share.start < share.stop]
        found = self.ranks.spread(lambda rows: method.quantize(weight_OI[rows], scheme, inputs), shares)
        parts = split_rows(stack_rows(found), [len(weight) for weight in weights])
        return [
            (part, self._result(linear.name, part, part.relative_error(weight), method.name))
            for linear, weight, part in zip(linears, weights, parts, strict=True)
        ]

    def _read(self, tensors: list[TensorSpec]) -> Weights:
        return {tensor.name: self._folded_or_stored(tensor) for tensor in tensors}

    def _folded_or_stored(self, tensor: TensorSpec) -> Tensor:
        return self.folded[tensor.name] if tensor.name in self.folded else self.checkpoint.read(tensor)

    def _read_linear(self, tensor: TensorSpec, *, transposed: bool) -> Tensor:
        if tensor.name in self.folded:
            return self.folded[tensor.name]
        weight = self.checkpoint.read(tensor)
        return weight.T.contiguous() if transposed else weight

    def _quantized(
        self, name: str, tensor: TensorSpec, *, transposed: bool, inputs: InputStatistics | None = None
    ) -> tuple[Tensor | QuantizedWeight, LayerResult]:
        scheme, method = self.assignments[name].scheme, self.method
        if method is None or scheme is None:
            plain = self._read_linear(tensor, transposed=transposed)
            return plain, self._result(name, plain, None, None)
        if method.needs_inputs and inputs is None:
            method = Rtn()
        if transposed or not method.rows_are_independent:
            weight = self._read_linear(tensor, transposed=transposed)
            quantized = method.quantize(weight, scheme, inputs)
            return quantized, self._result(name, quantized, quantized.relative_error(weight), method.name)
        rows, columns = tensor.shape
        step = max(1, CHUNK_WEIGHTS // columns)

        def quantize_rows(start: int) -> tuple[QuantizedWeight, float, float]:
            weight = self.checkpoint.read_rows(tensor, start, min(rows, start + step))
            chunk = method.quantize(weight, scheme, inputs)
            error = float((weight - chunk.dequantize()).square().sum(dtype=torch.float64))
            return chunk, error, float(weight.square().sum(dtype=torch.float64))

        chunks, errors, norms = zip(*self.ranks.spread(quantize_rows, range(0, rows, step)), strict=True)
        quantized, error, norm = stack_rows(list(chunks)), sum(errors), sum(norms)
        return quantized, self._result(name, quantized, (error / norm) ** 0.5 if norm else 0.0, method.name)

    def _result(
        self, name: str, weight: Tensor | QuantizedWeight, error: float | None, method: str | None
    ) -> LayerResult:
        reason = self.assignments[name].reason
        if not isinstance(weight, QuantizedWeight):
            return LayerResult(name=name, scheme=None, method=None, reason=reason or "not quantized")
        if method is not None:
            # Values of heads may be turned within the stream; it is one fold by its name.
            folds = dict.fromkeys([*([Rotate.name] if self.turned else []), *self.folds_of.get(name, [])])
            method = JOIN.join([*folds, method])
        return LayerResult(name=name, scheme=weight.scheme.name, method=method, reason=reason, relative_error=error)
