"""A report as Markdown, for a pull request or a page."""

from collections.abc import Collection, Iterable, Sequence

from llmopt.report.layers import COLUMNS as LAYER_COLUMNS
from llmopt.report.layers import layer_rows
from llmopt.report.results import METRICS, GateResult, LayerResult, Report
from llmopt.report.rows import COLUMNS, GATE_COLUMNS, comparison, gate_rows, measured_on, unmeasured


def escape(text: str) -> str:
    """Text from outside (names, paths, reasons) that Markdown must not read: on one line, and inert."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~$" else letter for letter in " ".join(text.split()))


def code(text: str) -> str:
    """Text from outside as code, on one line; a backtick in it becomes an apostrophe."""
    flat = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table; what comes from outside has been escaped before."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_table(report: Report, metrics: Collection[str] = frozenset(METRICS)) -> str:
    """What was measured of every model, one row a metric and model."""
    rows = [
        ("" if number else each.title, escape(name), *cells)
        for each in comparison(report, metrics)
        for number, (name, *cells) in enumerate(each.rows)
    ]
    return table(("metric", "model", *COLUMNS[1:]), rows)


def layer_table(layers: Iterable[LayerResult]) -> str:
    """What every layer got, equal blocks in one row."""
    rows = [(code(name), *map(escape, cells)) for name, *cells in layer_rows(layers)]
    return table(LAYER_COLUMNS, rows)


def gate_table(gates: Sequence[GateResult]) -> str:
    """Every promise with its verdict and what was compared with the bound."""
    rows = [(verdict, code(expr), escape(model), *cells) for verdict, expr, model, *cells in gate_rows(gates)]
    return table(GATE_COLUMNS, rows)


def as_markdown(report: Report) -> str:
    """The whole report."""
    parts = ["# llmopt report", comparison_table(report)]
    if text := measured_on(report):
        parts.append(f"{escape(text[:1].upper() + text[1:])}.")
    if missing := unmeasured(report):
        parts.append(f"Not measured: {', '.join(map(code, missing))}.")
    if report.gates:
        parts += ["## Gates", gate_table(report.gates)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in report.notes)]
    for candidate in report.candidates:
        if candidate.layers:
            parts += [f"## Layers of {escape(candidate.name)}", layer_table(candidate.layers)]
    return "\n\n".join(parts) + "\n"
