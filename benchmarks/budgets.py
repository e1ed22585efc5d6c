"""Perplexity against size over a range of budgets, on the reference model: none exceeded, and the more the better.

python -m benchmarks.budgets --calib FILE --text FILE [--method gptq] [--budgets 80 85 92 98 105 120] [--plot curve.png]

Budgets are in MB. Ends with 1 if an artifact is larger than its budget, or certainly worse than a smaller one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.reference import reference_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An artifact: its budget and size in MB, and perplexity against float32, relative, with its 95 % interval."""

    budget: float
    size: float
    relative: float
    low: float
    high: float
    divergence: float
    predicted: float


def llmopt(*arguments: str) -> str:
    """What a command of llmopt prints; what it says of its progress is shown."""
    print("$ llmopt", *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "llmopt", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(folder: Path, budgets: list[float], method: str, calib: str, how: list[str]) -> list[Point]:
    """Write an artifact for each budget, and measure all of them on the same tokens."""
    model = str(reference_model())
    folders = [folder / f"{budget:g}MB" for budget in budgets]
    predicted = []
    for budget, output in zip(budgets, folders, strict=True):
        options = ["--budget", f"{budget:g}MB", "--method", method, "--calib", calib, "--json", "--quiet", "--force"]
        llmopt("quantize", model, "-o", str(output), *options)
        settings = json.loads((output / "report.json").read_text())["settings"]
        predicted.append(settings["budget"]["predicted"]["kl_divergence"])
    report = json.loads(llmopt("bench", *map(str, folders), "--baseline", model, "--json", "--no-latency", *how))
    points = []
    for budget, guess, candidate in zip(budgets, predicted, report["candidates"], strict=True):
        delta, metrics = candidate["deltas"]["perplexity"], candidate["metrics"]
        points.append(
            Point(
                budget=budget,
                size=metrics["size_bytes"]["value"] / 1e6,
                relative=delta["relative"],
                low=delta["low"],
                high=delta["high"],
                divergence=metrics["kl_divergence"]["value"],
                predicted=guess,
            )
        )
    return points


def draw(points: list[Point], path: Path) -> None:
    """Perplexity against size, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    sizes, values = [point.size for point in points], [100 * point.relative for point in points]
    below = [100 * (point.relative - point.low) for point in points]
    above = [100 * (point.high - point.relative) for point in points]
    axes.errorbar(sizes, values, yerr=(below, above), marker="o", capsize=3)
    axes.set(xlabel="model files, MB", ylabel="perplexity against float32, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="other text, to evaluate on")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--budgets", type=float, nargs="+", default=[80, 85, 92, 98, 105, 120], metavar="MB")
    parser.add_argument("--tokens", default="8192", help="of the text to evaluate on")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep the artifacts there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(exist_ok=True)
        how = ["--text", arguments.text, "--tokens", arguments.tokens]
        points = measure(folder, sorted(arguments.budgets), arguments.method, arguments.calib, how)
    for point in points:
        print(
            f"budget {point.budget:6.1f} MB: {point.size:6.2f} MB, perplexity {point.relative:+.2%} "
            f"[{point.low:+.2%}, {point.high:+.2%}], KL divergence {point.divergence:.4f} of {point.predicted:.4f}"
        )
    if arguments.plot:
        draw(points, arguments.plot)
    exceeded = [point for point in points if point.size > point.budget]
    worse = [larger for smaller, larger in pairwise(points) if larger.low > smaller.high]
    print(f"{len(exceeded)} of {len(points)} exceed their budget; {len(worse)} are certainly worse than a smaller one")
    return 1 if exceeded or worse else 0


if __name__ == "__main__":
    sys.exit(main())
