"""Which basis of the residual stream rounds best: the stored one, or one of a few rotations.

Before anything is quantized, some windows go through the float model once. What enters and leaves a linear in a turned
basis is what does so in the stored one, turned; so one pass judges all of them, by the error of every linear that reads
the stream or writes to it when its weight, and its inputs where the scheme says so, are rounded.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmopt.artifact import Journal
from llmopt.engine.base import TokenIds
from llmopt.engine.blocks import RotaryTables, block_forward, embed, normalize, plain
from llmopt.model.checkpoint import Tensors, open_checkpoint
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec
from llmopt.model.turned import TurnedTensors, turned
from llmopt.pipeline.basis import Basis
from llmopt.pipeline.calibration import SAMPLED_TOKENS
from llmopt.pipeline.formats.base import Assignments
from llmopt.pipeline.journal import choice_name
from llmopt.pipeline.moments import TINY, BlockSampler, Sampler
from llmopt.pipeline.parts import CHUNK_WEIGHTS, EXACT_BITS
from llmopt.pipeline.prepare import Prepared
from llmopt.pipeline.ranks import ALONE
from llmopt.pipeline.soundness import open_tokenizer
from llmopt.progress import Progress
from llmopt.quantize.fold import FoldedLinear, InputSample, output_error
from llmopt.quantize.rotate import Rotate
from llmopt.quantize.scheme import Scheme

LOOKED_AT = 4  # windows


def chosen_basis(prepared: Prepared, kept: Journal | None, progress: Progress) -> Basis | None:
    """The basis for a request; None where there is nothing to choose. An earlier run's choice is in its journal.

    Raises:
        ModelError: the weights are damaged.
    """
    if prepared.rotate is None:
        return None
    assert prepared.calibration is not None
    torch.set_num_threads(prepared.request.threads)
    spec, assignments = prepared.source.spec, prepared.assignments
    windows = prepared.calibration.windows(spec, open_tokenizer(prepared.source))
    with open_checkpoint(prepared.source) as checkpoint:
        find = partial(best_basis, spec, checkpoint, assignments, windows, prepared.rotate, progress=progress)
        return remembered(kept, f"{choice_name(assignments, windows)}-basis.json", find)


def remembered(journal: Journal | None, name: str, find: Callable[[], Basis]) -> Basis:
    """What an earlier run found, or else what `find` does, which is then kept for later ones."""
    data = None if journal is None else journal.read(name)
    if data is not None:
        return Basis(**json.loads(data))
    basis = find()
    if journal is not None:
        journal.write(name, json.dumps(basis.to_json()).encode())
    return basis


def best_basis(
    spec: ModelSpec,
    tensors: Tensors,
    assignments: Assignments,
    windows: Sequence[TokenIds],
    rotate: Rotate,
    *,
    progress: Progress,
) -> Basis:
    """Try some rotations on a few of the windows. The stored basis wins a tie.

    Raises:
        ModelError: the weights are damaged.
    """
    few = [windows[index] for index in range(0, len(windows), -(-len(windows) // LOOKED_AT))]
    turns = [rotate.of_stream(spec.hidden_size, seed) for seed in range(rotate.stream_tries)]
    judge = _Judge(spec, tensors, assignments, turns)
    with progress.task("trying rotations", total=len(spec.blocks) + 1) as task, torch.inference_mode():
        for _ in judge.run(few):
            task.advance()
    as_stored, *others = judge.means()
    best = min(range(len(others)), key=others.__getitem__)
    return Basis(seed=best if others[best] < as_stored else None, error_as_stored=as_stored, error_turned=others[best])


@dataclass(frozen=True)
class _View:
    """The model in one basis, and the stream in it."""

    tensors: Tensors
    turn_HH: Tensor | None  # None: as stored

    def inputs(self, normed_NH: Tensor, gain_H: Tensor) -> Tensor:
        """What enters a linear behind a norm that has given this before its gain."""
        return normed_NH * gain_H if self.turn_HH is None else turned(normed_NH, self.turn_HH)

    def outputs(self, y_NH: Tensor) -> Tensor:
        """What a linear writes to the stream, from what the stored one writes."""
        return y_NH if self.turn_HH is None else turned(y_NH, self.turn_HH)


class _Judge:
    """Sums the errors of every basis, the stored one first, while tokens go through the float model."""

    def __init__(self, spec: ModelSpec, tensors: Tensors, assignments: Assignments, turns: Sequence[Tensor]) -> None:
        self.spec = spec
        self.assignments = assignments
        self.stored = tensors
        self.unit = TurnedTensors(tensors, spec, None)  # its inputs of linears need no gain taken out of them
        turned_views = [_View(TurnedTensors(tensors, spec, turn_HH), turn_HH.double()) for turn_HH in turns]
        self.views = [_View(tensors, None), *turned_views]
        self.errors: list[list[float]] = []  # of each linear, by basis

    def run(self, windows: Sequence[TokenIds]) -> Iterator[None]:
        """Go through the model; stops behind each block, and at the end."""
        spec, stride = self.spec, max(1, sum(map(len, windows)) // SAMPLED_TOKENS)
        rotary = RotaryTables(spec, max(map(len, windows)))
        table = self._read(spec.embedding.tensors())
        hidden = [embed(spec.embedding, table, torch.from_numpy(ids)[None]) for ids in windows]
        del table
        for block in spec.blocks:
            weights = self._read(block.tensors())
            sampler = BlockSampler(block, plain(weights), lambda: Sampler(stride, 0, ALONE))
            for index, state in enumerate(hidden):
                turn = rotary.turn(block, 0, state.shape[1])
                hidden[index] = block_forward(block, weights, state, turn, apply=sampler.apply)
            del weights
            self._block(block, sampler.samples())
            yield
        self._head(hidden, Sampler(stride, 0, ALONE))
        yield

    def means(self) -> list[float]:
        """The mean error over linears, of each basis."""
        return [sum(errors) / len(self.errors) for errors in zip(*self.errors, strict=True)]

    def _block(self, block: Block, samples: Mapping[str, InputSample]) -> None:
        attention, mlp = block.attention, block.mlp
        for norm, readers in ((block.attention_norm, attention.inputs), (block.mlp_norm, mlp.inputs)):
            normed_NH, gain_H = samples[readers[0].name].tokens_NI, self.unit.gain(norm)
            for linear in readers:
                self._reads(linear, normed_NH, gain_H, linear.out_features)
        for linear in (attention.output, mlp.down):
            self._writes(linear, samples[linear.name].tokens_NI)

    def _head(self, hidden: Sequence[Tensor], sampler: Sampler) -> None:
        """At 8 bits, in groups, a head errs too little to count."""
        spec, scheme = self.spec, self._scheme_of(self.spec.head)
        if scheme is None or (scheme.bits >= EXACT_BITS and scheme.activation_bits > EXACT_BITS):
            return
        weights = self._read(spec.final_norm.tensors())
        for state in hidden:
            sampler.add(normalize(spec.final_norm, weights, state))
        normed_NH, gain_H = sampler.sample().tokens_NI, self.unit.gain(spec.final_norm)
        if spec.tied:  # the gain is in the product before the head, and not in the table
            normed_NH, gain_H = normed_NH * gain_H, torch.ones_like(gain_H)
        self._reads(spec.head, normed_NH, gain_H, max(1, CHUNK_WEIGHTS // spec.hidden_size))

    def _reads(self, linear: Linear, normed_NH: Tensor, gain_H: Tensor, rows: int) -> None:
        """Note the errors of a linear that reads the stream, so many rows at a time."""
        scheme = self._scheme_of(linear)
        if scheme is None:
            return
        errors, square = [0.0] * len(self.views), 0.0
        inputs = [view.inputs(normed_NH, gain_H) for view in self.views]
        for start in range(0, linear.out_features, rows):
            some = partial(_rows, tensor=linear.weight, start=start, stop=min(start + rows, linear.out_features))
            exact_NO = inputs[0] @ some(self.stored).T
            square += float(exact_NO.square().sum(dtype=torch.float64))
            for place, (view, x_NI) in enumerate(zip(self.views, inputs, strict=True)):
                errors[place] += _error(some(view.tensors), scheme, x_NI, exact_NO)
        self._note(errors, square)

    def _writes(self, linear: Linear, x_NI: Tensor) -> None:
        """Note the errors of a linear that writes to the stream."""
        scheme = self._scheme_of(linear)
        if scheme is None:
            return
        exact_NO = x_NI @ self.stored.read(linear.weight).T
        errors = [_error(view.tensors.read(linear.weight), scheme, x_NI, view.outputs(exact_NO)) for view in self.views]
        self._note(errors, float(exact_NO.square().sum(dtype=torch.float64)))

    def _note(self, errors: Sequence[float], square: float) -> None:
        self.errors.append([error / max(square, TINY) for error in errors])

    def _scheme_of(self, linear: Linear) -> Scheme | None:
        return self.assignments[linear.name].scheme

    def _read(self, tensors: Iterable[TensorSpec]) -> dict[str, Tensor]:
        return {tensor.name: self.unit.read(tensor) for tensor in tensors}


def _rows(tensors: Tensors, *, tensor: TensorSpec, start: int, stop: int) -> Tensor:
    return tensors.read_rows(tensor, start, stop)


def _error(weight_OI: Tensor, scheme: Scheme, x_NI: Tensor, exact_NO: Tensor) -> float:
    sample = InputSample(tokens_NI=x_NI, largest_I=x_NI.abs().amax(0))
    return output_error([FoldedLinear(weight_OI, scheme)], sample, None, [exact_NO])
