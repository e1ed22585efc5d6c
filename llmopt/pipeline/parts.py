"""The model in parts, embedding first and head last: read, quantized, and handed on one at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from torch import Tensor

from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.pipeline.calibration import Calibration, Weights
from llmopt.pipeline.folding import fold_block
from llmopt.pipeline.journal import EMBEDDING, HEAD, Part, PartJournal, block_name
from llmopt.pipeline.pace import NO_TIME_TO_FIT, NO_TIME_TO_LEARN, Pace
from llmopt.pipeline.ranks import ALONE
from llmopt.pipeline.reconstruct import Reconstruction
from llmopt.pipeline.spill import States
from llmopt.pipeline.trials import Trial, try_in_pieces, try_joined
from llmopt.quantize.assign import Assignment
from llmopt.quantize.fold import Fold
from llmopt.quantize.method import InputStatistics, Method
from llmopt.quantize.reconstruct import RECONSTRUCT
from llmopt.quantize.registry import JOIN
from llmopt.quantize.rotate import Rotate
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme
from llmopt.quantize.weights import QuantizedWeight
from llmopt.report.results import LayerResult

# Weights in flight while a table is quantized: rounding holds a few temporaries of this size.
CHUNK_WEIGHTS = 1 << 22
EXACT_BITS = 8
BEFORE_HEAD = "float32: it carries the last norm's gain through the rotation, which the tied table has no place for"
CHOSEN = "least error on held-out text"


def fits_table(spec: ModelSpec, scheme: Scheme | None, method: Method) -> bool:
    """Whether a table is fitted to what enters the head that it serves as too; at 8 bits there is nothing to gain."""
    return spec.tied and method.needs_inputs and scheme is not None and scheme.bits < EXACT_BITS


class PartReader:
    """Reads a checkpoint part by part and quantizes what is assigned a scheme. `method` None quantizes nothing.

    A method that needs inputs gets them from the `calibration`, which the parts pass through; so do `folds`, which
    scale the weights of a block before they are quantized. A table is rounded to nearest, for it has no inputs; but one
    that serves as the head is fitted to those of the head. Parts that a `journal` has are not made again; those that it
    lacks are put there. What is `turned`, the checkpoint has turned already. `pace` says what there is time for, where
    a method has candidates.

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
        pace: Pace | None = None,
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
        self.pace = pace or Pace()
        self.has_time = True  # for the slowest candidate, in the part at hand
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
        part = self._tied_head(embedding) if self.spec.tied else self._kept(HEAD, self._made_head)
        self.pace.finish()
        return part

    def _tied_head(self, embedding: Part) -> Part:
        head, part, shared = self.spec.head, self._entering_head(), embedding.layers[0]
        part.weights[head.weight.name] = embedding.weights[head.weight.name]
        part.weights.update(self._read(list(head.tensors())))
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
            self.reconstruction.follow(block, self.floats(block))

    def _made_embedding(self) -> Part:
        embedding = self.spec.embedding
        table, *others = embedding.tensors()
        weight, layer = self._quantized(embedding.name, table, transposed=False, inputs=self._inputs_of_tied_head())
        return Part({table.name: weight, **self._read(others)}, [layer])

    def _made_block(self, block: Block) -> Part:
        self._begin(len(self.spec.blocks) - block.index + self._head_in_blocks())
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

    def _begin(self, left: float, size: float = 1.0) -> None:
        """See what there is time for in the next part; its size and what is left with it are in blocks."""
        if self.method is not None and self.method.candidates:
            self.has_time = self.ranks.of_first(partial(self.pace.begin, left, size))

    def _head_in_blocks(self) -> float:
        """How much work a head of its own is, in blocks."""
        if self.spec.tied or self.assignments[self.spec.head.name].scheme is None:
            return 0.0
        return self.spec.head.weight.count / sum(linear.weight.count for linear in self.spec.blocks[-1].linears())

    def _refit(self, reconstruction: Reconstruction, block: Block, part: Part, entering: States) -> None:
        """Have a block learn from the float one; its layers say so, if that made it better."""
        floats = self.folded or self.floats(block)
        reconstruction.follow(block, floats)
        if not self.has_time:
            return
        blocks = len(self.spec.blocks) - block.index
        if not self.ranks.of_first(partial(self.pace.learns, blocks, self._head_in_blocks())):
            part.layers[:] = [
                layer if layer.scheme is None else replace(layer, reason=_joined(layer.reason, NO_TIME_TO_LEARN))
                for layer in part.layers
            ]
            return
        with self.pace.timed(RECONSTRUCT):
            is_better = reconstruction.refit(block, part.weights, floats, entering)
        if not is_better:
            return
        for index, (layer, linear) in enumerate(zip(part.layers, block.linears(), strict=True)):
            weight = part.weights[linear.weight.name]
            if isinstance(weight, QuantizedWeight):
                error = weight.relative_error(floats[linear.weight.name])
                part.layers[index] = replace(layer, method=f"{layer.method}{JOIN}{RECONSTRUCT}", relative_error=error)

    def _made_head(self) -> Part:
        part = self._entering_head()
        inputs = None if self.calibration is None else self.calibration.head(part.weights)
        if size := self._head_in_blocks():
            self._begin(size, size)
        self._add(part, [self.spec.head], inputs)
        return part

    def _fold(self, block: Block) -> None:
        """Have the weights of a block folded; from then on they are read as they were left."""
        self.folded, self.folds_of = {}, {}
        if not self.folds:
            return
        assert self.calibration is not None
        floats = self.floats(block)
        for fold in self.folds:
            samples = self.calibration.look(block, floats)
            for name in fold_block(fold, block, floats, samples, self._scheme_of, ranks=self.ranks):
                self.folds_of.setdefault(name, []).append(fold.name)
        self.folded = floats

    def floats(self, block: Block) -> dict[str, Tensor]:
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
        """What a method, or the best of its candidates for each, makes of linears above one another."""
        weights = [self._read_linear(linear.weight, transposed=linear.transposed) for linear in linears]
        trials = []
        for candidate in self._candidates(method):
            with self.pace.timed(candidate.name):
                trials.append(try_joined(candidate, weights, scheme, inputs, self.ranks))
        found = zip(*trials, strict=True)
        return [self._chosen(linear.name, of_one) for linear, of_one in zip(linears, found, strict=True)]

    def _candidates(self, method: Method) -> Sequence[Method]:
        """What is tried in place of a method; where time is short, not the slowest."""
        return method.candidates[: None if self.has_time else -1] or (method,)

    def _chosen(self, name: str, trials: Sequence[Trial]) -> tuple[QuantizedWeight, LayerResult]:
        """The trial that errs least on held-out text, the first of equal ones, and what a report says of it."""
        if len(trials) == 1:
            (only,) = trials
            return only.weight, self._result(name, only.weight, only.relative_error, only.method)
        errors = {trial.method: trial.held_out_error or 0.0 for trial in trials}
        best = min(trials, key=lambda trial: errors[trial.method])
        layer = self._result(name, best.weight, best.relative_error, best.method)
        reason = _joined(layer.reason, CHOSEN, *[NO_TIME_TO_FIT] * (not self.has_time))
        return best.weight, replace(layer, reason=reason, held_out_errors=errors)

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
        unseen = method.needs_inputs and inputs is None
        candidates = (Rtn(scales=method.scales),) if unseen else self._candidates(method)
        rows, columns = tensor.shape
        whole = transposed or not all(candidate.rows_are_independent for candidate in candidates)
        step = rows if whole else max(1, CHUNK_WEIGHTS // columns)

        def read(start: int) -> Tensor:
            if whole:
                return self._read_linear(tensor, transposed=transposed)
            return self.checkpoint.read_rows(tensor, start, min(rows, start + step))

        starts = range(0, rows, step)
        trials = [try_in_pieces(one, read, starts, scheme, inputs, ranks=self.ranks) for one in candidates]
        return self._chosen(name, trials)

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


def _joined(*reasons: str | None) -> str:
    """Reasons as one."""
    return "; ".join(filter(None, reasons))
