"""A report for the terminal, and as the JSON that `report.json` holds and `--json` prints."""

import json
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmopt.report.layers import COLUMNS as LAYER_COLUMNS
from llmopt.report.layers import layer_rows
from llmopt.report.results import LayerResult, Report
from llmopt.report.rows import COLUMNS, GATE_COLUMNS, MetricRows, comparison, gate_rows, measured_on, unmeasured

# Only a rule under the head, drawn with what every stream can show.
HEAD_RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
GAP = 3  # blanks between columns
NAME_PREFIX = "model."
READABLE = 20  # the least width of a column of sentences
# For streams that cannot show them, such as a Windows pipe in code page 1252 or a C locale.
PLAIN_GLYPHS = {"—": "-", "–": "-", "±": "+/-", "×": "x", "…": "..."}


def as_json(report: Report) -> str:
    """The report's JSON, ending in a newline; ASCII, so that every stream can take it.

    Raises:
        ValueError: a number is NaN or infinite: what was not measured must be null.
    """
    return json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Everything but the layers, in words and numbers; colour is never the only sign of anything."""
    _print_comparison(list(comparison(report)), console)
    if text := measured_on(report):
        _print_line(text, console)
    if missing := unmeasured(report):
        _print_line(f"not measured: {', '.join(missing)}", console)
    if report.gates:
        console.print()
        _print_rows(GATE_COLUMNS, gate_rows(report.gates), console)
    for note in report.notes:
        console.print()
        _print_line(f"note: {note}", console)


def print_layers(layers: Iterable[LayerResult], console: Console) -> None:
    """What every layer got, equal blocks on one line.

    On a narrow console names lose the prefix that most have in common, which patterns need not have either, and reasons
    stand below: a name that is broken in the middle cannot be read.
    """
    rows = layer_rows(layers)
    widths = [max(map(len, column)) for column in zip(LAYER_COLUMNS, *rows, strict=True)]
    if sum(widths[:-1]) + GAP * len(widths) + READABLE <= console.width:
        _print_rows(LAYER_COLUMNS, rows, console)
        return
    short = [(name.removeprefix(NAME_PREFIX), *cells) for name, *cells in rows]
    _print_rows(LAYER_COLUMNS[:-1], [row[:-1] for row in short], console)
    for name, *_, reason in short:
        if reason:
            _print_line(f"{name}: {reason}", console)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Any rows under a head; the last column is folded first."""
    _print_rows(columns, rows, console)


def _print_comparison(metrics: Sequence[MetricRows], console: Console) -> None:
    """A line a metric and model, or two on a narrow console: the value above its interval, the change above its own."""
    rows = [COLUMNS, *((f"  {name}", *cells) for each in metrics for name, *cells in each.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    wide = sum(widths) + GAP * len(COLUMNS) <= console.width
    columns = COLUMNS if wide else _stacked(COLUMNS)
    table = _table(columns, console, numeric=range(1, len(columns)))
    for each in metrics:
        table.add_row(_text(each.title, console, style="bold"))
        for name, *cells in each.rows:
            row = (f"  {name}", *cells)
            table.add_row(*(_text(cell, console) for cell in (row if wide else _stacked(row))))
        table.add_section()
    console.print(table)


def _stacked(row: Sequence[str]) -> list[str]:
    """A row with each pair of its cells, behind the first, in one cell of two lines."""
    name, *cells = row
    return [name, *(f"{above}\n{below}".rstrip() for above, below in zip(cells[::2], cells[1::2], strict=True))]


def _print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Where space is short, the last column is folded first: it holds sentences, and the others names and numbers."""
    table = _table(columns, console)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)][:-1]
    if sum(widths) + GAP * len(columns) + READABLE <= console.width:
        for column, width in zip(table.columns, widths, strict=False):
            column.min_width = width
    for row in rows:
        table.add_row(*(_text(cell, console) for cell in row))
    console.print(table)


def _table(columns: Sequence[str], console: Console, numeric: Iterable[int] = ()) -> Table:
    table = Table(box=HEAD_RULE, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    right = set(numeric)
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if number in right else "left"
        # `fold`: rich marks a cut with an ellipsis, which not every stream can show, and a cut number lies.
        table.add_column(_text(column, console), justify=justify, overflow="fold")
    return table


def _print_line(line: str, console: Console) -> None:
    console.print(_text(line, console))


def _text(text: str, console: Console, style: str = "") -> Text:
    """Text that this console's stream can show, and that rich does not read as markup."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        for glyph, plain in PLAIN_GLYPHS.items():
            text = text.replace(glyph, plain)
        text = text.encode(console.encoding, errors="backslashreplace").decode(console.encoding)
    return Text(text, style=style)
