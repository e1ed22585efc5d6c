"""What every layer got, with equal blocks on one line: thirty blocks of seven linears are not 210 lines."""

import re
from collections.abc import Iterable
from itertools import groupby

from llmopt.report.numbers import MISSING
from llmopt.report.results import LayerResult

COLUMNS = ("layer", "scheme", "method", "relative error", "reason")

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def layer_rows(layers: Iterable[LayerResult]) -> list[tuple[str, ...]]:
    """Cells as in `COLUMNS`, in the order in which the layers first appear.

    Layers that differ only in the first number of their name share a row, `model.layers.{0..29}.mlp.down_proj`, when
    they got the same and for the same reason; their errors are then a range.
    """
    groups: dict[tuple[str, str | None, str | None, str | None], list[LayerResult]] = {}
    for layer in layers:
        pattern = _INDEX.sub("{}", layer.name, count=1)
        groups.setdefault((pattern, layer.scheme, layer.method, layer.reason), []).append(layer)
    return [
        (_name(pattern, members), scheme or MISSING, method or MISSING, _errors(members), reason or "")
        for (pattern, scheme, method, reason), members in groups.items()
    ]


def _name(pattern: str, members: list[LayerResult]) -> str:
    if len(members) == 1:
        return members[0].name
    indices = sorted(int(match[0]) for member in members if (match := _INDEX.search(member.name)))
    return pattern.replace("{}", f"{{{_ranges(indices)}}}", 1)


def _ranges(indices: list[int]) -> str:
    """`0..3,5` for 0, 1, 2, 3, 5."""
    runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _errors(members: list[LayerResult]) -> str:
    errors = [member.relative_error for member in members if member.relative_error is not None]
    if not errors:
        return MISSING
    low, high = f"{min(errors):.4f}", f"{max(errors):.4f}"
    return low if low == high else f"{low} – {high}"
