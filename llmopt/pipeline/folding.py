"""Folds in a block: which linears read what a norm or another linear makes, and what changes when that is scaled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmopt.model.spec import Attention, Block, Linear, Mlp, Norm
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.quantize.fold import Fold, FoldedLinear, InputSample, best_scales
from llmopt.quantize.scheme import Scheme

Floats = dict[str, Tensor]  # of a block, by name; linears as [out, in]
SchemeOf = Callable[[Linear], Scheme | None]
# Activations with act(c x) = c act(x) for c > 0, through which a scale may pass.
_HOMOGENEOUS = ("relu",)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a linear that make the inputs of another: as many inputs, each made by one row."""

    linear: Linear
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Joint:
    """Linears that share their inputs, and what makes these. `heads` as in `best_scales`."""

    makers: Norm | Rows
    readers: tuple[Linear, ...]
    heads: tuple[int, int] | None = None


def joints(block: Block) -> list[Joint]:
    """Every place of a block where a scale can be folded."""
    attention, mlp = block.attention, block.mlp
    found = [
        Joint(block.attention_norm, attention.inputs),
        Joint(values(attention), (attention.output,), (attention.kv_heads, attention.heads // attention.kv_heads)),
        Joint(block.mlp_norm, mlp.inputs),
    ]
    rows = multiplied(mlp)
    return found if rows is None else [*found, Joint(rows, (mlp.down,))]


def values(attention: Attention) -> Rows:
    """The rows that make values."""
    last = attention.inputs[-1]
    return Rows(last, last.out_features - attention.kv_size, last.out_features)


def multiplied(mlp: Mlp) -> Rows | None:
    """The rows that the inputs of `down` are proportional to; None where an activation is in the way."""
    last = mlp.inputs[-1]
    if mlp.gated or mlp.activation in _HOMOGENEOUS:
        return Rows(last, last.out_features - mlp.size, last.out_features)
    return None


def fold_block(
    fold: Fold,
    block: Block,
    floats: Floats,
    samples: Mapping[str, InputSample],
    scheme_of: SchemeOf,
    *,
    ranks: Ranks = ALONE,
) -> Sequence[str]:
    """Fold wherever that leaves outputs with less error; changes `floats`, and gives the names of linears that gained.

    `samples` has the inputs of each linear that is the first to read them, by its name. Several processes divide the
    searches among them.
    """
    # What was to stay as it is does.
    places = [joint for joint in joints(block) if all(map(scheme_of, joint.readers)) and _may_change(joint, scheme_of)]
    # All before any of them changes a weight: nothing that one changes is among what a later one searches with.
    found = ranks.spread(lambda joint: _scales(fold, joint, floats, samples, scheme_of), places)
    gained: list[str] = []
    for joint, scales_I in zip(places, found, strict=True):
        if scales_I is not None:
            for linear in joint.readers:
                floats[linear.weight.name] = floats[linear.weight.name] * scales_I
            _divide(joint, floats, scales_I)
            gained += [linear.name for linear in joint.readers]
    return gained


def _scales(
    fold: Fold, joint: Joint, floats: Floats, samples: Mapping[str, InputSample], scheme_of: SchemeOf
) -> Tensor | None:
    schemes = map(scheme_of, joint.readers)
    linears = [
        FoldedLinear(floats[linear.weight.name], scheme)
        for linear, scheme in zip(joint.readers, schemes, strict=True)
        if scheme is not None
    ]
    return best_scales(fold, linears, samples[joint.readers[0].name], joint.heads)


def _may_change(joint: Joint, scheme_of: SchemeOf) -> bool:
    return isinstance(joint.makers, Norm) or scheme_of(joint.makers.linear) is not None


def _divide(joint: Joint, floats: Floats, scales_I: Tensor) -> None:
    makers = joint.makers
    if isinstance(makers, Norm):
        weight = f"{makers.name}.weight"
        floats[weight] = (floats[weight] + makers.offset) / scales_I - makers.offset
        if makers.bias:
            floats[f"{makers.name}.bias"] = floats[f"{makers.name}.bias"] / scales_I
        return
    if joint.heads is not None:  # values are made once for all query heads that read them
        kv_heads, group = joint.heads
        scales_I = scales_I.view(kv_heads, group, -1)[:, 0].reshape(-1)
    names = [makers.linear.weight.name] + ([f"{makers.linear.name}.bias"] if makers.linear.bias else [])
    for name in names:
        changed = floats[name].clone()
        rows = changed[makers.start : makers.stop]
        rows /= scales_I.view(-1, *[1] * (rows.ndim - 1))
        floats[name] = changed
