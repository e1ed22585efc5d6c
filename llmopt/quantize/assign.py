"""Which scheme each linear and embedding gets: the one that was asked for, unless a pattern says otherwise.

The embedding and the head get 8-bit weights and float activations whatever was asked for: they are looked up or
multiplied once, and every logit feels their error. Formats that keep no such tables say so by another `TableRule`. An
override that names them is obeyed.

A pattern is a name with shell wildcards, matched against the whole name or any of its dotted tails: `lm_head`,
`down_proj`, `layers.0.*`, `model.layers.*.mlp.*`. The last override that matches wins; `ignore` wins over all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from llmopt.errors import UsageError, near_match
from llmopt.model.spec import ModelSpec
from llmopt.quantize.scheme import Scheme, parse_scheme

Override = tuple[str, Scheme]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRule:
    """What the embedding and the head get unless an override names them, and why.

    No scheme: they are left alone, and an override does not reach them.
    """

    scheme: Scheme | None
    reason: str


EIGHT_BITS = TableRule(
    scheme=parse_scheme("w8a16"), reason="tables keep 8 bits and float activations unless an override names them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one linear or embedding is to get; no scheme means left alone, and `reason` says why."""

    name: str
    scheme: Scheme | None
    reason: str | None = None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means this name."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def assign(
    spec: ModelSpec,
    default: Scheme,
    overrides: Sequence[Override] = (),
    ignore: Sequence[str] = (),
    tables: TableRule = EIGHT_BITS,
) -> dict[str, Assignment]:
    """Assign schemes to every quantizable tensor, by module name: the embedding, every linear, the head.

    A tied head and its embedding are one tensor: what is said of either holds for both.

    Raises:
        UsageError: a pattern matches nothing, an override means tables alone that stay float, or the two sides of a
            tied pair are to get different schemes.
    """
    table_names = (spec.embedding.name, spec.head.name)
    names = [spec.embedding.name, *(linear.name for linear in spec.linears())]
    _require_matches([pattern for pattern, _ in overrides] + list(ignore), names)
    unless_said = {name: _unless_said(name, default, tables if name in table_names else None) for name in names}
    if tables.scheme is None:
        _require_not_alone([pattern for pattern, _ in overrides], names, table_names, tables)
    reached = {name: overrides if tables.scheme is not None or name not in table_names else () for name in names}
    found = {name: _said(name, reached[name], ignore) or unless_said[name] for name in names}
    if spec.tied:
        _tie(found, *table_names, said=[name for name in table_names if found[name] is not unless_said[name]])
    return found


def _unless_said(name: str, default: Scheme, rule: TableRule | None) -> Assignment:
    if rule is None or (rule.scheme is not None and _alike(default, rule.scheme)):
        return Assignment(name=name, scheme=default)
    return Assignment(name=name, scheme=rule.scheme, reason=rule.reason)


def _alike(one: Scheme, other: Scheme) -> bool:
    return one.bits == other.bits and one.activation_bits == other.activation_bits


def _said(name: str, overrides: Sequence[Override], ignore: Sequence[str]) -> Assignment | None:
    ignored = next((pattern for pattern in ignore if matches(pattern, name)), None)
    if ignored is not None:
        return Assignment(name=name, scheme=None, reason=f"ignored: matches {ignored!r}")
    override = next((item for item in reversed(overrides) if matches(item[0], name)), None)
    if override is not None:
        return Assignment(name=name, scheme=override[1], reason=f"override: matches {override[0]!r}")
    return None


def _tie(found: dict[str, Assignment], table: str, head: str, *, said: Sequence[str]) -> None:
    if len(said) == 2 and found[head].scheme != found[table].scheme:
        raise UsageError(
            f"{head} and {table} are tied: they are one tensor and cannot have two schemes",
            hint=f"name only {head}",
        )
    leader, follower = (table, head) if said == [table] else (head, table)
    found[follower] = replace(found[leader], name=follower, reason=f"shares its bytes with {leader}")


def _require_matches(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            hint = near_match(pattern, sorted(set(_tails(names))), f"names look like {names[1]!r}")
            raise UsageError(f"{pattern!r} matches no linear and no embedding", hint=hint)


def _require_not_alone(
    patterns: Sequence[str], names: Sequence[str], table_names: Sequence[str], rule: TableRule
) -> None:
    """A wildcard may mean a table among others; an override that means nothing else would do nothing."""
    for pattern in patterns:
        meant = [name for name in names if matches(pattern, name)]
        if all(name in table_names for name in meant):
            raise UsageError(f"an override names {meant[0]}, and {rule.reason}", hint=f"leave {pattern!r} out")


def _tails(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[start:]) for start in range(len(parts)))
