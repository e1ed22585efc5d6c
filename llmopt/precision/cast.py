"""Which modules of a model may have 16 bits, and which stay float32: from the ranges that calibration text showed.

Every value is in the dtype of what writes it: a linear casts what it reads and gives its own dtype, a norm gives what
it reads or, if it is float32 itself, that; sums and products are as wide as the wider of their sides. So where
something overflows, what writes it stays float32, and what reads it too; and behind the first float32 that is added to
the residual stream, that is float32 to the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.errors import UsageError, near_match
from llmopt.model.spec import Block, ModelSpec
from llmopt.precision.short import BF16, FP16, FP32, TOLERANCE
from llmopt.quantize.assign import matches
from llmopt.report.results import LayerResult

DTYPES: Mapping[str, torch.dtype] = {FP16: torch.float16, BF16: torch.bfloat16}
MARGIN = 2.0  # text that was not read may have activations that are so much larger
CHUNK_WEIGHTS = 1 << 22  # that are looked at together: a table is large
UNDERFLOW_SHARE = 0.01  # of weights that may become zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One module: magnitudes of its weights and of what it read and gave, and what 16 bits did to them.

    `underflow` is the share of its weights, of those that are not zero, that becomes zero; `weight_error` is
    ‖W - Ŵ‖ / ‖W‖, and `error` the same of what it gives, as the root of the mean square over tokens.
    """

    largest_weight: float
    underflow: float
    weight_error: float
    largest_input: float = 0.0
    largest_output: float = 0.0
    error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """All that a scan saw: every module by its name, and the largest magnitude of the residual stream.

    `residual` is what entered the first block, and of each block what stood behind attention and behind the MLP.
    """

    modules: Mapping[str, Seen]
    embedded: float
    residual: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a module gets, and why it is not the dtype that was asked for, if it is not."""

    name: str
    half: bool
    reason: str | None
    relative_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CastPlan:
    """The dtype of every module, in the order of computation. `residual_from` says where the stream turns float32."""

    dtype_name: str
    choices: Mapping[str, Choice]
    residual_from: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of all modules that are not kept."""
        return DTYPES[self.dtype_name]

    @property
    def kept(self) -> tuple[Choice, ...]:
        """The modules that stay float32."""
        return tuple(choice for choice in self.choices.values() if not choice.half)

    def dtype_of(self, module: str) -> torch.dtype:
        """What one module's tensors are stored in."""
        return self.dtype if self.choices[module].half else torch.float32

    def layers(self) -> tuple[LayerResult, ...]:
        """What a report says of each."""
        return tuple(
            LayerResult(
                name=choice.name,
                scheme=self.dtype_name if choice.half else FP32,
                method="cast" if choice.half else None,
                reason=choice.reason,
                relative_error=choice.relative_error if choice.half else None,
            )
            for choice in self.choices.values()
        )


def modules(spec: ModelSpec) -> Iterator[str]:
    """Every module that has tensors, in the order of computation; learned positions go with the embedding."""
    yield spec.embedding.name
    for block in spec.blocks:
        yield block.attention_norm.name
        yield from (linear.name for linear in block.attention.inputs)
        yield from (norm.name for norm in (block.attention.q_norm, block.attention.k_norm) if norm is not None)
        yield block.attention.output.name
        yield from (norm.name for norm in (block.attention_post_norm, block.mlp_norm) if norm is not None)
        yield from (linear.name for linear in (*block.mlp.inputs, block.mlp.down))
        if block.mlp_post_norm is not None:
            yield block.mlp_post_norm.name
    yield spec.final_norm.name
    yield spec.head.name


def module_of(spec: ModelSpec, tensor: str) -> str:
    """The module that a tensor belongs to; learned positions go with the embedding."""
    name = tensor.rpartition(".")[0]
    positions = spec.embedding.positions
    return spec.embedding.name if positions is not None and name == positions.name else name


def require_patterns(spec: ModelSpec, patterns: Sequence[str]) -> None:
    """See that each pattern means a module.

    Raises:
        UsageError: one does not.
    """
    names = list(modules(spec))
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            tails = sorted({name.rpartition(".")[2] for name in names})
            raise UsageError(f"{pattern!r} matches no module", hint=near_match(pattern, tails))


def see_weight(weight: Tensor, dtype: torch.dtype) -> Seen:
    """What 16 bits do to some weights."""
    largest = squared = squared_error = 0.0
    nonzero = lost = 0
    for some in torch.split(weight.flatten(), CHUNK_WEIGHTS):
        rounded = some.to(dtype).float()
        largest = max(largest, float(some.abs().max()))
        squared += float(some.square().sum())
        squared_error += float((some - rounded).square().sum())
        nonzero += int(some.count_nonzero())
        lost += int((some != 0).logical_and_(rounded == 0).sum())
    return Seen(
        largest_weight=largest,
        underflow=lost / nonzero if nonzero else 0.0,
        weight_error=(squared_error / squared) ** 0.5 if squared else 0.0,
    )


def choose(
    spec: ModelSpec, ranges: Ranges, dtype_name: str, *, tolerance: float = TOLERANCE, keep_fp32: Sequence[str] = ()
) -> CastPlan:
    """Decide for every module."""
    chooser = _Chooser(spec, ranges, dtype_name, tolerance, keep_fp32)
    chooser.run()
    choices = {
        name: Choice(
            name=name,
            half=name not in chooser.kept,
            reason=chooser.kept.get(name),
            relative_error=max(ranges.modules[name].error, ranges.modules[name].weight_error),
        )
        for name in modules(spec)
    }
    return CastPlan(dtype_name=dtype_name, choices=choices, residual_from=chooser.residual_from)


class _Chooser:
    """The reasons to keep a module, collected; the first that is found is the one that is told."""

    def __init__(
        self, spec: ModelSpec, ranges: Ranges, dtype_name: str, tolerance: float, keep_fp32: Sequence[str]
    ) -> None:
        self.spec = spec
        self.ranges = ranges
        self.dtype_name = dtype_name
        self.end = torch.finfo(DTYPES[dtype_name]).max
        self.tolerance = tolerance
        self.keep_fp32 = keep_fp32
        self.kept: dict[str, str] = {}
        self.residual_from: str | None = None

    def run(self) -> None:
        """Each module by itself; then what follows from how they are connected."""
        for name in modules(self.spec):
            reason = self._asked(name) or self._own_reason(self.ranges.modules[name])
            if reason is not None:
                self.kept[name] = reason
        self._embedding()
        for block, (after_attention, after_mlp) in zip(self.spec.blocks, self.ranges.residual, strict=True):
            self._attention(block)
            self._residual(block.attention.output.name, after_attention)
            self._product(block)
            self._residual(block.mlp.down.name, after_mlp)
        if self.spec.tied:
            self._alike([self.spec.embedding.name, self.spec.head.name], "shares its bytes with")

    def _asked(self, name: str) -> str | None:
        pattern = next((pattern for pattern in self.keep_fp32 if matches(pattern, name)), None)
        return None if pattern is None else f"asked for: matches {pattern!r}"

    def _own_reason(self, seen: Seen) -> str | None:
        if not seen.largest_weight <= self.end:
            return self._beyond("its weights reach", seen.largest_weight)
        for what, largest in (("what it reads", seen.largest_input), ("what it gives", seen.largest_output)):
            if self._overflows(largest):
                return self._beyond(f"{what} reaches", largest)
        if seen.underflow > UNDERFLOW_SHARE:
            return f"underflow: {seen.underflow:.1%} of its weights would be zero in {self.dtype_name}"
        error = max(seen.error, seen.weight_error)
        if not error <= self.tolerance:
            return f"it would lose {error:.2%}, and {self.tolerance:.2%} is allowed"
        return None

    def _overflows(self, largest: float) -> bool:
        return not largest * MARGIN <= self.end

    def _beyond(self, what: str, largest: float) -> str:
        near = "" if largest > self.end else f", with a margin of {MARGIN:g}"
        return f"overflow: {what} {largest:.3g}, and {self.dtype_name} ends at {self.end:.5g}{near}"

    def _embedding(self) -> None:
        name = self.spec.embedding.name
        if self._overflows(self.ranges.embedded):
            self.kept.setdefault(name, self._beyond("what it gives reaches", self.ranges.embedded))
        head = self.spec.head.name
        if name in self.kept or (self.spec.tied and head in self.kept):
            self.residual_from = name

    def _attention(self, block: Block) -> None:
        """Queries, keys and values meet in one kernel, which has one dtype."""
        attention = block.attention
        norms = [norm.name for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        linears = [linear.name for linear in attention.inputs]
        kept = next((name for name in (*linears, *norms) if name in self.kept), None)
        if kept is not None:
            for name in linears:
                self.kept.setdefault(name, f"attention computes in one dtype: {kept} is kept")

    def _residual(self, writer: str, largest: float) -> None:
        """The stream is float32 from the first writer on that has to be; from then on sums do not overflow."""
        if self.residual_from is None and self._overflows(largest):
            self.kept.setdefault(writer, self._beyond("the residual stream that it writes reaches", largest))
        if self.residual_from is None and writer in self.kept:
            self.residual_from = writer

    def _product(self, block: Block) -> None:
        """What the last linear of an MLP reads, the others write."""
        largest = self.ranges.modules[block.mlp.down.name].largest_input
        if self._overflows(largest):
            for linear in block.mlp.inputs:
                self.kept.setdefault(linear.name, self._beyond("what comes of its outputs reaches", largest))

    def _alike(self, names: Sequence[str], why: str) -> None:
        kept = next((name for name in names if name in self.kept), None)
        if kept is not None:
            for name in names:
                self.kept.setdefault(name, f"{why} {kept}")
