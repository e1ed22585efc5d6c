"""Every scheme on the reference model: quality, size, speed and memory, in one interleaved run.

python -m benchmarks.reference --text FILE [--calib FILE] [--tokens 16384] [--rounds 6] [--output FOLDER]

With --calib, every method that reads text beside rounding, for accuracy alone: speed is that of the scheme.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.reference import reference_model

ARTIFACTS = {
    "w8a16": ["--scheme", "w8a16"],
    "w4a16": ["--scheme", "w4a16"],
    "w4a16-sym": ["--scheme", "w4a16-sym"],
    "w4a16-sym-all": ["--scheme", "w4a16-sym", "--override", "lm_head=w4a16-sym"],
    "w8a8": ["--scheme", "w8a8"],
}


METHODS = {
    "w4a16": ("search", "gptq", "reconstruct"),
    "w4a16-sym": ("search", "gptq", "awq", "rotate", "awq+gptq", "rotate+gptq", "auto"),
    # The search is for fewer bits; folds are for the activations.
    "w8a8": ("gptq", "smoothquant+gptq", "awq+gptq", "rotate+gptq"),
}
CALIBRATED = {
    f"{scheme}-{method}": ["--scheme", scheme, "--method", method]
    for scheme, methods in METHODS.items()
    for method in methods
}


def llmopt(*arguments: str) -> None:
    """Run a command of llmopt, and end with it if it fails."""
    print("$ llmopt", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "llmopt", *arguments], check=True)


def compare(folder: Path, model: str, artifacts: Mapping[str, Sequence[str]], how: Sequence[str]) -> None:
    """Write the artifacts, and measure all of them against the model."""
    for name, options in artifacts.items():
        llmopt("quantize", model, "-o", str(folder / name), "--threads", "2", "--force", *options)
    llmopt("bench", *(str(folder / name) for name in artifacts), "--baseline", model, *how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--calib", type=Path, help="text to calibrate on")
    parser.add_argument("--tokens", default="16384", help="tokens of it")
    parser.add_argument("--rounds", default="6", help="rounds of fresh processes")
    parser.add_argument("--output", type=Path, help="keep the artifacts there")
    arguments = parser.parse_args()
    model = str(reference_model())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text = ["--text", str(arguments.text), "--tokens", arguments.tokens, "--threads", "2"]
        latency = ["--rounds", arguments.rounds, "--prompt", "512", "--tokens-out", "64"]
        compare(folder, model, ARTIFACTS, [*text, *latency])
        if arguments.calib is not None:
            calib = ["--calib", str(arguments.calib)]
            calibrated = {name: [*options, *calib] for name, options in CALIBRATED.items()}
            compare(folder, model, calibrated, [*text, "--no-latency"])


if __name__ == "__main__":
    main()
