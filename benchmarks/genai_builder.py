"""Against the int4 model that onnxruntime-genai's own builder writes: both under onnxruntime-genai, interleaved.

python -m benchmarks.genai_builder [--rounds 6] [--threads 2]

Each measurement is a process of its own: 512 tokens of prompt, then 128 generated ones, five times, the best one kept.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rivals.engines import measure
from tests.reference import reference_model

OURS = {
    "w4a16-sym, head 4 bits": ["--scheme", "w4a16-sym", "--override", "lm_head=w4a16-sym"],
    "w4a16-sym": ["--scheme", "w4a16-sym"],
}
BUILDER = "genai builder int4"


def run(folder: Path, threads: int) -> tuple[float, float]:
    """Tokens per second of prefill and decode, from a process of its own."""
    found = measure(sys.executable, "genai", folder, threads)
    return found["prefill"], found["decode"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
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
