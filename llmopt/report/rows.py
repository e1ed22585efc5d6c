"""A report as rows of text, the same for the terminal and for Markdown."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from llmopt.report import numbers
from llmopt.report.gates import parse_gate
from llmopt.report.results import METRICS, Candidate, Delta, GateResult, Measurement, Report, Subject
from llmopt.words import counted

TITLES = {
    "size_bytes": "size on disk",
    "perplexity": "perplexity",
    "kl_divergence": "KL divergence, nats",
    "top1_agreement": "top-1 agreement",
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "prefill_tokens_per_s": "prefill",
    "decode_tokens_per_s": "decode",
    "peak_rss_bytes": "peak memory",
}
COLUMNS = ("", "value", "95 % interval", "change", "95 % interval", "noise", "detectable")
GATE_COLUMNS = ("verdict", "gate", "model", "measured", "95 % interval")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRows:
    """One metric: its title, and for each model the cells of `COLUMNS`."""

    title: str
    rows: tuple[tuple[str, ...], ...]


def comparison(report: Report, metrics: Collection[str] = frozenset(METRICS)) -> Iterator[MetricRows]:
    """Every one of `metrics` that was measured of at least one model."""
    for metric in METRICS:
        if metric in metrics and _measured(report, metric):
            rows = tuple(_row(metric, subject) for subject in _subjects(report))
            yield MetricRows(title=TITLES[metric], rows=rows)


def unmeasured(report: Report) -> list[str]:
    """Names of the metrics that no model has."""
    return [metric for metric in METRICS if not _measured(report, metric)]


def measured_on(report: Report) -> str | None:
    """What accuracy was measured on: how many tokens, and how many documents, which are what intervals come from."""
    text = report.settings.get("fidelity")
    if text is None:
        return None
    counts = f"{counted(text['tokens'], 'token')} of {counted(text['clusters'], text['clustered_by'])}"
    return f"accuracy on {text['text']}: {counts}"


def gate_rows(gates: Sequence[GateResult]) -> list[tuple[str, ...]]:
    """One row a verdict, cells as in `GATE_COLUMNS`; the numbers are those that were compared with the bound."""
    return [(gate.verdict, gate.expr, gate.candidate or "", *_compared(gate)) for gate in gates]


def _subjects(report: Report) -> tuple[Subject, ...]:
    return (*([report.baseline] if report.baseline else []), *report.candidates)


def _measured(report: Report, metric: str) -> bool:
    return any(subject.metrics.get(metric) is not None for subject in _subjects(report))


def _row(metric: str, subject: Subject) -> tuple[str, ...]:
    measured = subject.metrics.get(metric)
    values = (subject.name, numbers.value_text(metric, measured), numbers.interval_text(metric, measured))
    delta = subject.deltas.get(metric) if isinstance(subject, Candidate) else None
    if delta is None:
        return (*values, "", "", "", "")
    return (
        *values,
        numbers.change_text(delta),
        numbers.change_interval_text(delta),
        numbers.noise_text(delta),
        numbers.detectable_text(delta),
    )


def _compared(result: GateResult) -> tuple[str, str]:
    if result.value is None:
        return numbers.MISSING, ""
    gate = parse_gate(result.expr)
    if gate.against == "change":
        delta = Delta(relative=result.value, low=result.low, high=result.high)
        return numbers.change_text(delta), numbers.change_interval_text(delta)
    # A ratio has no unit, whatever its metric has.
    metric, unit = ("", "1") if gate.against == "ratio" else (gate.metric, METRICS[gate.metric][0])
    measured = Measurement(value=result.value, low=result.low, high=result.high, n=1, unit=unit)
    suffix = " x" if gate.against == "ratio" else ""
    return numbers.value_text(metric, measured) + suffix, numbers.interval_text(metric, measured)
