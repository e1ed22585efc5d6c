"""How fast artifacts are, against a baseline that runs beside them.

Each round runs every variant once, each in a fresh process, and the baseline twice: what its second block shows against
its first is the noise floor. Rounds come in pairs, the second in the reverse order of the first, so that a machine that
slowly warms up or slows down does so for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import UsageError
from llmopt.measure.block import Block, Job
from llmopt.measure.cautions import calls_cautions, load_cautions, noise_cautions
from llmopt.measure.host import load_average, usable_cores
from llmopt.measure.outcome import Outcome
from llmopt.measure.process import WORKER, run_worker
from llmopt.measure.stats import max_percentile
from llmopt.measure.timing import TAILS, Calls, baseline_side, candidate_side, changes
from llmopt.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySettings:
    """What is measured: requests of `prompt_tokens` that are answered with exactly `output_tokens`.

    Raises:
        UsageError: a number is too small to measure anything.
    """

    threads: int
    prompt_tokens: int = 128
    output_tokens: int = 32
    rounds: int = 6
    repetitions: int = 8  # with 6 rounds 48 calls, enough for p90
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Fail before the first process starts."""
        # Two output tokens at least: TPOT is the time of those after the first.
        for name, least in (
            ("threads", 1),
            ("prompt_tokens", 1),
            ("output_tokens", 2),
            ("rounds", 1),
            ("repetitions", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}, and must be at least {least}")
        if self.timeout_s <= 0:
            raise UsageError(f"timeout_s is {self.timeout_s:g}, and must be above 0")


def measure_latency(
    baseline: Path,
    candidates: Sequence[Path],
    settings: LatencySettings,
    *,
    seed: int,
    progress: Progress,
    command: Sequence[str] = WORKER,
) -> Outcome:
    """Measure artifact folders in interleaved blocks of fresh processes.

    Raises:
        LlmoptError: an artifact does not open, or its process dies or takes too long.
    """
    paths = [baseline, *candidates, baseline]
    load_before = load_average()
    jobs = _jobs(paths, settings, seed, command)
    # The baseline's folder is named by its hash, which says nothing to anybody.
    names = ["the baseline", *(path.name for path in candidates), "the baseline again"]
    blocks: list[list[Block]] = [[] for _ in paths]
    with progress.task("latency", total=settings.rounds * len(paths)) as task:
        for variant in schedule(len(paths), settings.rounds, seed):
            blocks[variant].append(run_worker(jobs[variant], settings.timeout_s, command))
            task.advance(note=names[variant])
    first, *others, second = [Calls.of(of_variant) for of_variant in blocks]
    together = first.with_calls(second)
    prompt = settings.prompt_tokens
    noise = changes(second, first, prompt, seed)
    named = [("the baseline", together), *((path.name, calls) for path, calls in zip(candidates, others, strict=True))]
    return Outcome(
        baseline=baseline_side(together, prompt, seed),
        candidates=tuple(candidate_side(calls, together, noise, prompt, seed) for calls in others),
        settings={"latency": _described(settings, blocks[0][0], load_before)},
        notes=(
            *load_cautions(load_before, usable_cores()),
            *calls_cautions(named),
            *noise_cautions(noise),
            *_limits(settings),
        ),
    )


def schedule(variants: int, rounds: int, seed: int) -> Iterator[int]:
    """Which variant runs next: a random order, rotated by one for each pair of rounds, and reversed in every second."""
    order = np.random.default_rng(seed).permutation(variants)
    for round_ in range(rounds):
        rotated = np.roll(order, -(round_ // 2))
        yield from (int(variant) for variant in (rotated[::-1] if round_ % 2 else rotated))


def _jobs(paths: Sequence[Path], settings: LatencySettings, seed: int, command: Sequence[str]) -> list[Job]:
    """One job a variant, all with the same tokens.

    Each variant is opened once before: that finds a broken artifact before minutes are spent, brings the files into
    memory for all alike, and tells which token ids all of them know.
    """
    threads = settings.threads
    opened = [
        run_worker(Job(path=str(path), threads=threads), settings.timeout_s, command) for path in dict.fromkeys(paths)
    ]
    vocab_size = min(block.vocab_size for block in opened)
    count = settings.prompt_tokens + settings.output_tokens - 1
    ids = [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, count)]
    prompt, continuation = ids[: settings.prompt_tokens], ids[settings.prompt_tokens :]
    return [
        Job(
            path=str(path),
            threads=threads,
            prompt_ids=prompt,
            continuation_ids=continuation,
            repetitions=settings.repetitions,
        )
        for path in paths
    ]


def _described(settings: LatencySettings, block: Block, load_before: float | None) -> dict[str, Any]:
    return asdict(settings) | {"engine": block.engine, "load_before": load_before, "load_after": load_average()}


def _limits(settings: LatencySettings) -> list[str]:
    """What the sample is too small for."""
    limits = []
    if settings.rounds < 2:
        limits.append("latency has no interval with a single round; measure at least 2, better 6")
    calls = settings.rounds * settings.repetitions
    missing = [f"p{tail * 100:.0f}" for tail in TAILS if max_percentile(calls) < tail]
    if missing:
        limits.append(f"{calls} calls cannot support {' or '.join(missing)}: the slowest call stands in their place")
    return limits
