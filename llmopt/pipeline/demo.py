"""The whole way on the embedded model: two schemes, held against the model itself."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from llmopt.artifact import check_destination
from llmopt.measure.latency import LatencySettings
from llmopt.pipeline.bench import BenchRequest, BenchSettings, bench
from llmopt.pipeline.quantize import quantize
from llmopt.pipeline.request import QuantizeRequest
from llmopt.progress import Progress
from llmopt.quantize.scheme import parse_scheme
from llmopt.report.results import Report

SCHEMES = ("w8a16", "w4a16")
# Enough to see both deltas, and done in well under a minute on two cores.
TOKENS = 8192
ROUNDS, REPETITIONS, PROMPT, OUTPUT = 4, 4, 128, 32


def run_demo(output: Path | None, *, seed: int, threads: int, force: bool, progress: Progress) -> Report:
    """Quantize `demo` with each scheme into a folder under `output` (None: a temporary one), and bench both."""
    with ExitStack() as stack:
        if output is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="llmopt-demo-")))
        else:
            output.mkdir(parents=True, exist_ok=True)
            folder = output
        paths = [folder / scheme for scheme in SCHEMES]
        for path in paths:
            check_destination(path, force=force)
        for scheme, path in zip(SCHEMES, paths, strict=True):
            request = QuantizeRequest(
                model="demo", output=path, scheme=parse_scheme(scheme), seed=seed, threads=threads, force=force
            )
            quantize(request, progress)
        timing = LatencySettings(
            threads=threads, prompt_tokens=PROMPT, output_tokens=OUTPUT, rounds=ROUNDS, repetitions=REPETITIONS
        )
        request_bench = BenchRequest(
            candidates=tuple(map(str, paths)),
            baseline="demo",
            settings=BenchSettings(tokens=TOKENS, latency=timing),
            seed=seed,
            threads=threads,
        )
        return bench(request_bench, progress)
