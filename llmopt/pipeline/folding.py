"""Folds in a block: which linears read what a norm or another linear makes, and what changes with that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llmopt.model.spec import Attention, Block, Linear, Mlp, Norm
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.quantize.fold import Change, Fold, FoldedLinear, Heads, InputSample, best_change
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
    """Linears that share their inputs, and what makes these; with the heads, if they are values of heads."""

    makers: Norm | Rows
    readers: tuple[Linear, ...]
    heads: Heads | None = None


def joints(block: Block) -> list[Joint]:
    """Every place of a block where a change can be folded."""
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
    found = ranks.spread(lambda joint: _change(fold, joint, floats, samples, scheme_of), places)
    gained: list[str] = []
    for joint, change in zip(places, found, strict=True):
        if change is not None:
            for linear in joint.readers:
                floats[linear.weight.name] = change.of_weight(floats[linear.weight.name])
            _take_back(joint, floats, change)
            gained += [linear.name for linear in joint.readers]
    return gained


def _change(
    fold: Fold, joint: Joint, floats: Floats, samples: Mapping[str, InputSample], scheme_of: SchemeOf
) -> Change | None:
    schemes = map(scheme_of, joint.readers)
    linears = [
        FoldedLinear(floats[linear.weight.name], scheme)
        for linear, scheme in zip(joint.readers, schemes, strict=True)
        if scheme is not None
    ]
    return best_change(fold, linears, samples[joint.readers[0].name], joint.heads)


def _may_change(joint: Joint, scheme_of: SchemeOf) -> bool:
    return isinstance(joint.makers, Norm) or scheme_of(joint.makers.linear) is not None


def _take_back(joint: Joint, floats: Floats, change: Change) -> None:
    makers = joint.makers
    if isinstance(makers, Norm):
        weight = f"{makers.name}.weight"
        floats[weight] = change.of_maker(floats[weight] + makers.offset, None) - makers.offset
        if makers.bias:
            floats[f"{makers.name}.bias"] = change.of_maker(floats[f"{makers.name}.bias"], None)
        return
    names = [makers.linear.weight.name] + ([f"{makers.linear.name}.bias"] if makers.linear.bias else [])
    for name in names:
        changed = floats[name].clone()
        changed[makers.start : makers.stop] = change.of_maker(changed[makers.start : makers.stop], joint.heads)
        floats[name] = changed
