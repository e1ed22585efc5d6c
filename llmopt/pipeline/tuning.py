"""Kernels, and pieces of a prompt, by what this machine was measured to do fastest.

A choice other than the default has to be clearly faster, twice: what noise decides gains nothing. What was measured is
kept, so that later runs write the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.artifact import Journal
from llmopt.engine.ort import OrtEngine, open_session
from llmopt.export.onnx.kernels import Kernel, Shape, candidates
from llmopt.export.onnx.probe import one_product
from llmopt.measure import interleaved
from llmopt.measure.host import describe_host, versions
from llmopt.pipeline.cache import cache_folder
from llmopt.pipeline.timings import Timings
from llmopt.progress import Progress

MEASURED, DEFAULT = "measured", "default"
KERNELS = (MEASURED, DEFAULT)

PROMPT, ANSWER = 512, 128  # tokens, the work that is to be fast
CLEARLY = 1.1  # times as fast as the default
SHAPE_BUDGET_S, PREFILL_BUDGET_S = 0.5, 3.0
WHOLE = "whole"
CHUNKS = (256, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen among candidates, and the milliseconds that each takes for the prompt and the answer."""

    chosen: str
    milliseconds: Mapping[str, float]


@dataclass(slots=True)
class Tuning:
    """What is fastest with so many threads; `choices` fills as it is asked."""

    threads: int
    timings: Timings
    choices: dict[str, Choice] = field(default_factory=dict)

    def kernel(self, shape: Shape) -> Kernel:
        """The kernel of a product."""
        timed, kernels = shape.timed(), {kernel.name: kernel for kernel in candidates(shape)}
        return kernels[self._choose(timed.name, kernels, partial(time_kernels, timed, kernels, self.threads))]

    def chunk(self, model: str, folder: Path, vocab_size: int) -> int | None:
        """In pieces of how many tokens the artifact in `folder` reads a prompt; None: in one.

        `model` names what decides that: the model's shape and its schemes.
        """
        names = [WHOLE, *map(str, CHUNKS)]
        chosen = self._choose(model, names, partial(time_prefill, folder, vocab_size, self.threads))
        return None if chosen == WHOLE else int(chosen)

    def _choose(self, name: str, names: Collection[str], measure: Callable[[], dict[str, float]]) -> str:
        milliseconds = self.timings.of(name, names, partial(measured_twice, measure))
        self.choices[name] = Choice(chosen=clearly_fastest(milliseconds), milliseconds=milliseconds)
        return self.choices[name].chosen

    def chosen(self) -> dict[str, str]:
        """What was chosen, by name."""
        return {name: choice.chosen for name, choice in self.choices.items()}

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        return {
            "workload": {"prompt_tokens": PROMPT, "output_tokens": ANSWER},
            "choices": [
                {"name": name, "chosen": choice.chosen, "milliseconds": dict(choice.milliseconds)}
                for name, choice in self.choices.items()
            ],
        }


def tuning(threads: int, journal: Journal | None, progress: Progress) -> Tuning:
    """That of this machine, which decides as it did before what was decided before."""
    return Tuning(threads, Timings(timings_file(threads), journal, progress))


def timings_file(threads: int) -> Path:
    """Where the times of this machine are kept, for this onnxruntime and so many threads."""
    host = describe_host(threads)
    causes = [host["cpu"], host["machine"], host["isa"], threads, versions()["onnxruntime"]]
    return cache_folder() / "kernels" / f"{hashlib.sha256(json.dumps(causes).encode()).hexdigest()[:16]}.json"


def measured_on(threads: int) -> str:
    """The machine that kernels are measured on, as a manifest names it."""
    host = describe_host(threads)
    return f"{MEASURED} on {host['cpu'] or host['machine']} with {threads} threads"


def clearly_fastest(milliseconds: Mapping[str, float]) -> str:
    """The fastest, where it is clearly faster than the first, which is the default."""
    default, best = next(iter(milliseconds)), min(milliseconds, key=milliseconds.__getitem__)
    return best if milliseconds[default] >= CLEARLY * milliseconds[best] else default


def measured_twice(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The times of each, and of a second measurement the lesser ones, if by the first the default is not to stay."""
    first = measure()
    if clearly_fastest(first) == next(iter(first)):
        return first
    second = measure()
    return {name: min(time, second[name]) for name, time in first.items()}


def time_kernels(shape: Shape, kernels: Mapping[str, Kernel], threads: int) -> dict[str, float]:
    """Of each kernel, milliseconds for the prompt, or as much of it as the product reads, and the answer."""
    rng = np.random.default_rng(0)
    sizes = (PROMPT if shape.every_token else 1, 1)
    feeds = [{"x": rng.standard_normal((tokens, shape.columns), np.float32)} for tokens in sizes]
    sessions = [open_session(one_product(shape, kernel), Path(), threads) for kernel in kernels.values()]
    calls = [partial(session.run, None, feed) for session in sessions for feed in feeds]
    times = interleaved.fastest_ms(calls, SHAPE_BUDGET_S)
    return {name: times[2 * place] + ANSWER * times[2 * place + 1] for place, name in enumerate(kernels)}


def time_prefill(folder: Path, vocab_size: int, threads: int) -> dict[str, float]:
    """Milliseconds for the prompt, whole and in pieces that are fed behind one another."""
    engine = OrtEngine(folder, threads)
    ids_T = np.random.default_rng(0).integers(0, vocab_size, PROMPT)
    sizes: Sequence[int] = (PROMPT, *CHUNKS)

    def read(size: int) -> None:
        stream = engine.stream(PROMPT)
        for start in range(0, PROMPT, size):
            stream.feed(ids_T[start : start + size])

    times = interleaved.fastest_ms([partial(read, size) for size in sizes], PREFILL_BUDGET_S)
    return dict(zip([WHOLE, *map(str, CHUNKS)], times, strict=True))
