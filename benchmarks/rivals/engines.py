"""Artifacts in onnxruntime-genai beside llama.cpp and OpenVINO on the reference model: speed, in interleaved rounds.

python -m benchmarks.rivals.engines --python PYTHON [--rounds 6] [--threads 2] ARTIFACT…

PYTHON is that of an environment with llama-cpp-python, openvino-genai, onnxruntime-genai, gguf and safetensors; all
engines run there. Each measurement is a process of its own: 512 tokens of prompt, 128 more, the best of four.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from tests.reference import download_gguf, reference_model

HERE = Path(__file__).parent
Speeds = dict[str, float]  # tokens per second, of prefill and of decode


def rivals(python: str, scratch: Path) -> dict[str, tuple[str, Path]]:
    """Engine and file of each, by name."""
    command = [python, str(HERE / "gguf_files.py"), str(reference_model()), str(download_gguf(scratch)), str(scratch)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kinds = [
        ("llama.cpp", "q8_0"),
        ("llama.cpp", "q4_0"),
        ("llama.cpp", "q4_k_m"),
        ("openvino", "q8_0"),
        ("openvino", "q4_0"),
    ]
    return {f"{engine} {kind}": (engine, scratch / f"{kind}.gguf") for engine, kind in kinds}


def measure(python: str, engine: str, path: Path, threads: int) -> Speeds:
    """What one process finds."""
    command = [python, str(HERE / "engine_worker.py"), engine, str(path), "--threads", str(threads)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: Speeds = json.loads(printed.splitlines()[-1])
    return found


def show(found: dict[str, list[Speeds]], ours: list[str]) -> None:
    """Medians, and the median, least and largest ratio of the rounds of ours to each rival."""
    for name, speeds in found.items():
        prefill, decode = (statistics.median(speed[what] for speed in speeds) for what in ("prefill", "decode"))
        print(f"{name:28s} prefill {prefill:6.0f} tokens/s  decode {decode:6.1f} tokens/s")
    for name in ours:
        for rival in (other for other in found if other not in ours):
            ratios = {
                what: sorted(mine[what] / theirs[what] for mine, theirs in zip(found[name], found[rival], strict=True))
                for what in ("prefill", "decode")
            }
            words = [f"{w} {statistics.median(r):.2f} [{r[0]:.2f}, {r[-1]:.2f}]" for w, r in ratios.items()]
            print(f"{name} to {rival}: {', '.join(words)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of the engines' environment")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("artifacts", nargs="+", type=Path, help="folders that llmopt wrote from the reference model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        ours = {folder.name: ("genai", folder) for folder in arguments.artifacts}
        all_of_them = ours | rivals(arguments.python, Path(temporary))
        found: dict[str, list[Speeds]] = {name: [] for name in all_of_them}
        for number in range(arguments.rounds):
            order = list(all_of_them.items())
            for name, (engine, path) in order if number % 2 == 0 else reversed(order):
                found[name].append(measure(arguments.python, engine, path, arguments.threads))
        show(found, list(ours))


if __name__ == "__main__":
    main()
