"""Every scheme on the reference model: quality, size, speed and memory, in one interleaved run.

python -m benchmarks.reference --text FILE [--tokens 16384] [--rounds 6] [--output FOLDER]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.reference import reference_model

ARTIFACTS = {
    "w8a16": ["--scheme", "w8a16"],
    "w4a16": ["--scheme", "w4a16"],
    "w4a16-sym": ["--scheme", "w4a16-sym"],
    "w4a16-sym-all": ["--scheme", "w4a16-sym", "--override", "lm_head=w4a16-sym"],
    "w8a8": ["--scheme", "w8a8"],
}


def llmopt(*arguments: str) -> None:
    """Run a command of llmopt, and end with it if it fails."""
    print("$ llmopt", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "llmopt", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--tokens", default="16384", help="tokens of it")
    parser.add_argument("--rounds", default="6", help="rounds of fresh processes")
    parser.add_argument("--output", type=Path, help="keep the artifacts there")
    arguments = parser.parse_args()
    model = str(reference_model())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, options in ARTIFACTS.items():
            llmopt("quantize", model, "-o", str(folder / name), "--threads", "2", "--force", *options)
        paths = [str(folder / name) for name in ARTIFACTS]
        bench = ["--text", str(arguments.text), "--tokens", arguments.tokens, "--rounds", arguments.rounds]
        llmopt("bench", *paths, "--baseline", model, *bench, "--prompt", "512", "--tokens-out", "64", "--threads", "2")


if __name__ == "__main__":
    main()
