"""Tensor parallelism as Megatron-LM has it (Shoeybi et al. 2019, arXiv 1909.08053): what each rank of a stage holds.

What reads the hidden states is cut by its outputs, whole heads and single MLP channels; what writes to them by its
inputs, so that the ranks' results add up to that of the whole. Tables are cut by vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmopt.model.checkpoint import Tensors
from llmopt.model.spec import Block, Linear, ModelSpec, TensorSpec

_READ_AT_ONCE = 1 << 20  # values of which a rank keeps some columns

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Share:
    """Which share of a stage is meant: number `index` of `degree` equal ones."""

    index: int = 0
    degree: int = 1

    def of(self, size: int) -> Range:
        """Begin and end of its part of `size` things in a row, as even as can be."""
        return size * self.index // self.degree, size * (self.index + 1) // self.degree


@dataclass(frozen=True, slots=True)
class Cut:
    """Some of a stored tensor: the `ranges` along `axis`, one behind the other. Without ranges, all of it."""

    tensor: TensorSpec
    axis: int = 0
    ranges: tuple[Range, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is kept."""
        if not self.ranges:
            return self.tensor.shape
        kept = sum(stop - start for start, stop in self.ranges)
        return (*self.tensor.shape[: self.axis], kept, *self.tensor.shape[self.axis + 1 :])

    def read(self, tensors: Tensors) -> Tensor:
        """The values, float32; never more of the tensor in memory than what is kept and a little beside it."""
        if not self.ranges or len(self.tensor.shape) == 1:
            return self.take(tensors.read(self.tensor))
        if self.axis == 0:
            parts = [tensors.read_rows(self.tensor, start, stop) for start, stop in self.ranges]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        rows, columns = self.tensor.shape
        at_once = max(1, _READ_AT_ONCE // columns)
        kept = torch.empty(self.shape)
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            kept[start:stop] = self.take(tensors.read_rows(self.tensor, start, stop))
        return kept

    def take(self, values: Tensor) -> Tensor:
        """What is kept of the whole tensor."""
        if not self.ranges:
            return values
        return torch.cat([values.narrow(self.axis, start, stop - start) for start, stop in self.ranges], self.axis)


def local_block(block: Block, share: Share) -> Block:
    """The block as one rank computes it: fewer heads and channels.

    Linears that write to the hidden states lose their bias: it is to be added once, behind the sum over the ranks.
    """
    if share.degree == 1:
        return block
    attention, mlp = block.attention, block.mlp
    return replace(
        block,
        attention=replace(
            attention,
            heads=attention.heads // share.degree,
            kv_heads=attention.kv_heads // share.degree,
            inputs=tuple(_fewer_outputs(linear, share) for linear in attention.inputs),
            output=_fewer_inputs(attention.output, share),
        ),
        mlp=replace(
            mlp,
            inputs=tuple(_fewer_outputs(linear, share) for linear in mlp.inputs),
            down=_fewer_inputs(mlp.down, share),
        ),
    )


def writers(block: Block) -> tuple[Linear, Linear]:
    """The linears that write to the hidden states, whose results the ranks add up."""
    return block.attention.output, block.mlp.down


def block_cuts(block: Block, share: Share) -> Iterator[Cut]:
    """What a rank reads of a block."""
    for norm in block.norms():
        yield from map(Cut, norm.tensors())
    for linear, sizes in _output_sizes(block):
        yield from _by_outputs(linear, sizes, share)
    for linear in writers(block):
        yield from _by_inputs(linear, share)


def vocabulary_cut(table: TensorSpec, share: Share) -> Cut:
    """Rows of a table, or of the head and its bias."""
    return Cut(table) if share.degree == 1 else Cut(table, 0, (share.of(table.shape[0]),))


def head_cuts(spec: ModelSpec, share: Share) -> Iterator[Cut]:
    """What a rank of the last stage reads besides its blocks."""
    yield from map(Cut, spec.tensors_before_head())
    yield vocabulary_cut(spec.head.weight, share)
    if spec.head.bias:
        yield vocabulary_cut(TensorSpec(f"{spec.head.name}.bias", (spec.head.out_features,)), share)


def embedding_cuts(spec: ModelSpec, share: Share) -> Iterator[Cut]:
    """What a rank of the first stage reads besides its blocks; learned positions it reads whole."""
    embedding = spec.embedding
    table, *positions = embedding.tensors()
    yield vocabulary_cut(table, share)
    yield from map(Cut, positions)


def _output_sizes(block: Block) -> Iterator[tuple[Linear, Sequence[int]]]:
    """Linears that read the hidden states, each with the sizes of what its outputs are, one behind the other."""
    attention, mlp = block.attention, block.mlp
    sizes = (attention.q_size, attention.kv_size, attention.kv_size)
    if len(attention.inputs) == 1:
        yield attention.inputs[0], sizes
    else:
        yield from ((linear, (size,)) for linear, size in zip(attention.inputs, sizes, strict=True))
    if mlp.gated and len(mlp.inputs) == 1:
        yield mlp.inputs[0], (mlp.size, mlp.size)
    else:
        yield from ((linear, (mlp.size,)) for linear in mlp.inputs)


def _by_outputs(linear: Linear, sizes: Sequence[int], share: Share) -> Iterator[Cut]:
    ranges, start = [], 0
    for size in sizes:
        first, stop = share.of(size)
        ranges.append((start + first, start + stop))
        start += size
    kept = tuple(ranges) if share.degree > 1 else ()
    weight, *bias = linear.tensors()
    yield Cut(weight, 1 if linear.transposed else 0, kept)
    yield from (Cut(tensor, 0, kept) for tensor in bias)


def _by_inputs(linear: Linear, share: Share) -> Iterator[Cut]:
    weight, *bias = linear.tensors()
    kept = (share.of(linear.in_features),) if share.degree > 1 else ()
    yield Cut(weight, 0 if linear.transposed else 1, kept)
    yield from map(Cut, bias)


def _fewer_outputs(linear: Linear, share: Share) -> Linear:
    return replace(linear, out_features=linear.out_features // share.degree)


def _fewer_inputs(linear: Linear, share: Share) -> Linear:
    return replace(linear, in_features=linear.in_features // share.degree, bias=False)
