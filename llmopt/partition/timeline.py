"""When each stage computes, as events: micro-batches of a prefill, then rounds of decoding; as SVG and as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from llmopt.partition.plan import Plan

_ROUNDS = 3
_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")
_WIDTH, _ROW, _LEFT, _TOP = 1000, 26, 190, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One micro-batch on one stage, in milliseconds from the start."""

    stage: int
    micro_batch: int
    phase: Literal["prefill", "decode"]
    start_ms: float
    end_ms: float


def events(plan: Plan, rounds: int = _ROUNDS) -> list[Event]:
    """A replay of the plan: a stage takes what comes; a group's next token waits for its last."""
    free = [0.0] * len(plan.stages)
    found: list[Event] = []
    groups = min(plan.micro_batches, -(-plan.workload.batch // plan.replicas))
    ready = [0.0] * groups
    for number in range(plan.micro_batches):
        ready[number % groups] = _pass(plan, found, free, (number, "prefill"), 0.0)
    for _ in range(min(rounds, plan.workload.output - 1)):
        for group in range(groups):
            ready[group] = _pass(plan, found, free, (group, "decode"), ready[group])
    return found


def _pass(
    plan: Plan,
    found: list[Event],
    free: list[float],
    what: tuple[int, Literal["prefill", "decode"]],
    at_ms: float,
) -> float:
    number, phase = what
    for index, stage in enumerate(plan.stages):
        start = max(at_ms, free[index])
        at_ms = free[index] = start + (stage.prefill_ms if phase == "prefill" else stage.decode_ms)
        found.append(Event(stage=index, micro_batch=number, phase=phase, start_ms=start, end_ms=at_ms))
    return at_ms


def bottleneck(plan: Plan, phase: Literal["prefill", "decode"]) -> int:
    """The stage that takes longest."""
    times = [stage.prefill_ms if phase == "prefill" else stage.decode_ms for stage in plan.stages]
    return times.index(max(times))


def as_text(plan: Plan, width: int = 64) -> str:
    """A row a stage: the micro-batch that it computes, for the prefill and a few rounds of decoding."""
    every = events(plan)
    lines = []
    for phase in ("prefill", "decode"):
        chosen = [event for event in every if event.phase == phase]
        if chosen:
            lines += [*_phase_text(plan, chosen, width), ""]
    return "\n".join(lines[:-1])


def _phase_text(plan: Plan, chosen: Sequence[Event], width: int) -> list[str]:
    phase = chosen[0].phase
    begin = min(event.start_ms for event in chosen)
    length = max(event.end_ms for event in chosen) - begin or 1.0
    slowest = bottleneck(plan, phase)
    what = "prefill" if phase == "prefill" else "first tokens of decoding"
    lines = [f"{what}, {length:.4g} ms; bottleneck: stage {slowest} on {plan.stages[slowest].devices[0]}"]
    for number in range(len(plan.stages)):
        cells = ["·"] * width
        for event in chosen:
            if event.stage == number:
                first = int((event.start_ms - begin) / length * width)
                last = max(int((event.end_ms - begin) / length * width), first + 1)
                cells[first:last] = [str(event.micro_batch % 10)] * (min(last, width) - first)
        lines.append(f"{number:>4} {''.join(cells[:width])}")
    return lines


def as_svg(plan: Plan) -> str:
    """The same as a picture."""
    every = events(plan)
    length = max(event.end_ms for event in every)
    scale = (_WIDTH - _LEFT - 10) / length if length else 0.0
    height = _TOP + _ROW * len(plan.stages) + 30
    slow = bottleneck(plan, "prefill"), bottleneck(plan, "decode")
    title = f"{plan.model}: TTFT {plan.predicted.ttft_ms:.4g} ms, TPOT {plan.predicted.tpot_ms:.4g} ms"
    subtitle = f"bottleneck of prefill: stage {slow[0]}; of decoding: stage {slow[1]}; numbers are micro-batches"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif"'
    lines = [
        f'{head} font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{escape(title)}</text><text x="8" y="40">{escape(subtitle)}</text>',
    ]
    for number, stage in enumerate(plan.stages):
        y = _TOP + _ROW * number
        name = f"{number} {stage.devices[0]}" + (f" ×{stage.tp}" if stage.tp > 1 else "")
        weight = ' font-weight="bold"' if number in slow else ""
        lines.append(f'<text x="8" y="{y + 16}"{weight}>{escape(name)}</text>')
    lines += [_box(event, scale) for event in every]
    axis = f'<text x="{_LEFT}" y="{height - 8}">0 ms</text><text x="{_WIDTH - 10}" y="{height - 8}" '
    return "\n".join([*lines, f'{axis}text-anchor="end">{length:.4g} ms</text>', "</svg>\n"])


def _box(event: Event, scale: float) -> str:
    x, width = _LEFT + event.start_ms * scale, max((event.end_ms - event.start_ms) * scale, 0.4)
    y, opacity = _TOP + _ROW * event.stage, 1.0 if event.phase == "prefill" else 0.55
    color = _COLORS[event.micro_batch % len(_COLORS)]
    box = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 4}" fill="{color}" opacity="{opacity}"/>'
    label = f'<text x="{x + 3:.2f}" y="{y + 15}" fill="white">{event.micro_batch}</text>' if width > 14 else ""
    return box + label
