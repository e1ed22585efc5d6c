"""Against the int4 model that onnxruntime-genai's own builder writes: both under onnxruntime-genai, interleaved.

python -m benchmarks.genai_builder [--rounds 6] [--threads 2]

Each measurement is a process of its own: 512 tokens of prompt, then 128 generated ones, five times, the best one kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.reference import reference_model

PROMPT, OUTPUT, REPETITIONS = 512, 128, 5
OURS = {
    "w4a16-sym, head 4 bits": ["--scheme", "w4a16-sym", "--override", "lm_head=w4a16-sym"],
    "w4a16-sym": ["--scheme", "w4a16-sym"],
}
BUILDER = "genai builder int4"


def worker(folder: str, threads: int) -> None:
    """Print the best prefill and decode of this process, in seconds, as JSON."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    times = []
    for repetition in range(REPETITIONS):
        prompt = np.random.default_rng(repetition).integers(10, 40_000, PROMPT).astype(np.int32)
        parameters = og.GeneratorParams(model)
        length = PROMPT + OUTPUT + 8
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        began = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(OUTPUT):
            generator.generate_next_token()
        times.append((first - began, time.perf_counter() - first))
    prefill, decode = (min(column) for column in zip(*times[1:], strict=True))  # the first warms up
    print(json.dumps([prefill, decode]))


def run(folder: Path, threads: int) -> tuple[float, float]:
    """Tokens per second of prefill and decode, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.genai_builder", "--worker", str(folder), "--threads", str(threads)]
    prefill, decode = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return PROMPT / prefill, OUTPUT / decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.threads)
        return
    model = reference_model()
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name.replace(" ", "-") for name in (BUILDER, *OURS)}
        build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-p", "int4", "-e", "cpu"]
        build += ["-o", str(folders[BUILDER]), "-c", f"{temporary}/cache"]
        subprocess.run(build, check=True, capture_output=True)
        for name, options in OURS.items():
            quantize = [
                sys.executable,
                "-m",
                "llmopt",
                "quantize",
                str(model),
                "-o",
                str(folders[name]),
                "-q",
                *options,
            ]
            subprocess.run(quantize, check=True, capture_output=True)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
        for round_ in range(arguments.rounds):
            order = list(folders) if round_ % 2 == 0 else list(folders)[::-1]
            for name in order:
                found[name].append(run(folders[name], arguments.threads))
        for name, speeds in found.items():
            ratios = [
                [mine / theirs for mine, theirs in zip(ours, builders, strict=True)]
                for ours, builders in zip(speeds, found[BUILDER], strict=True)
            ]
            prefill, decode = (statistics.median(column) for column in zip(*speeds, strict=True))
            prefill_ratio, decode_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
            print(
                f"{name:26s} prefill {prefill:6.0f} tokens/s ({prefill_ratio:.2f} x)  "
                f"decode {decode:6.1f} tokens/s ({decode_ratio:.2f} x)"
            )


if __name__ == "__main__":
    main()
