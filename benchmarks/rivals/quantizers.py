"""llm-compressor's GPTQ and AutoRound beside llmopt's on the reference model: time and quality, in interleaved rounds.

python -m benchmarks.rivals.quantizers --python PYTHON --calib FILE --text FILE [--rounds 1] [--only gptq]

PYTHON is that of an environment with llmcompressor and auto-round (`pip install torch==2.13.0 llmcompressor
auto-round`). Of llmopt the whole command counts, with the export to ONNX and its check; of the others quantizing alone.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.reference import reference_model

WORKER = Path(__file__).with_name("quantizer_worker.py")
OURS = {
    "gptq": ["--scheme", "w4a16-sym", "--method", "gptq"],
    "autoround": ["--scheme", "w4a16", "--method", "reconstruct"],
}


def run(command: Sequence[str]) -> tuple[str, float, float]:
    """What a process printed, how long it took in seconds, and its peak resident memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return printed, time.perf_counter() - began, _megabytes(usage)


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of the others' environment")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=sorted(OURS), help="one of the two pairs")
    arguments = parser.parse_args()
    model = str(reference_model())
    tools = [arguments.only] if arguments.only else sorted(OURS)
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for number in range(arguments.rounds):
            for tool in tools:
                theirs, ours = (f"{temporary}/{tool}-{whose}-{number}" for whose in ("theirs", "llmopt"))
                worker = [arguments.python, str(WORKER), tool, model, arguments.calib, theirs]
                printed, _, their_memory = run(worker)
                their_seconds = json.loads(printed.splitlines()[-1])["seconds"]
                quantize = [sys.executable, "-m", "llmopt", "quantize", model, "-o", ours, "--calib", arguments.calib]
                _, our_seconds, our_memory = run([*quantize, *OURS[tool], "--threads", "2", "-q"])
                print(
                    f"{tool}: theirs {their_seconds:.0f} s, {their_memory:.0f} MB; llmopt {our_seconds:.0f} s, "
                    f"{our_memory:.0f} MB: {our_seconds / their_seconds:.2f} of the time",
                    flush=True,
                )
                if number == 0:
                    folders += [theirs, ours]
        bench = [sys.executable, "-m", "llmopt", "bench", *folders, "--baseline", model, "--text", arguments.text]
        subprocess.run([*bench, "--tokens", "16384", "--no-latency", "--threads", "2"], check=True)


if __name__ == "__main__":
    main()
