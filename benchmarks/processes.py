"""How much faster two processes are than one, a thread each, in interleaved rounds.

python -m benchmarks.processes [--rounds 3] MODEL [OPTIONS of llmopt quantize]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ONE = (sys.executable, "-m", "llmopt")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmopt")


def seconds(program: Sequence[str], model: str, options: Sequence[str]) -> float:
    """Of one `llmopt quantize`, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["quantize", model, "-o", str(Path(folder) / "out"), "--threads", "1", "-q", *options]
        began = time.perf_counter()
        subprocess.run([*program, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model to quantize")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each of both")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of llmopt quantize")
    arguments = parser.parse_args()
    ratios = []
    for number in range(arguments.rounds):
        load = os.getloadavg()[0]
        one, two = (seconds(program, arguments.model, arguments.options) for program in (ONE, TWO))
        ratios.append(one / two)
        print(
            f"round {number + 1}: one process {one:6.1f} s, two {two:6.1f} s, ratio {ratios[-1]:.2f} "
            f"(load average before {load:.1f}, cores {os.cpu_count()})",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
