"""How large a model's weights are on disk."""

from collections.abc import Sequence
from pathlib import Path

from llmopt.measure.outcome import Outcome, Side
from llmopt.report.results import METRICS, Delta, Measurement

# The first form that a folder holds is the one that counts: an ONNX export beside its source is not both.
FORMS = (("*.onnx", "*.onnx.data", "*.onnx_data"), ("*.safetensors",), ("*.gguf",))


def model_bytes(path: Path) -> int | None:
    """Bytes of the model files of a folder (graph and weights, not the tokenizer), or of one file; None without any."""
    if path.is_file():
        return path.stat().st_size
    for patterns in FORMS:
        sizes = [file.stat().st_size for pattern in patterns for file in path.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def compare_sizes(baseline: Path | None, candidates: Sequence[Path]) -> Outcome:
    """Sizes and how they change; a size is exact and has no interval. A baseline without files has no size."""
    before = model_bytes(baseline) if baseline else None
    return Outcome(
        baseline=_side(before, None), candidates=tuple(_side(model_bytes(path), before) for path in candidates)
    )


def _side(size: int | None, before: int | None) -> Side:
    if size is None:
        return Side(metrics={})
    measured = Measurement(value=float(size), n=1, unit=METRICS["size_bytes"][0])
    return Side(
        metrics={"size_bytes": measured}, deltas={"size_bytes": Delta(relative=size / before - 1.0)} if before else {}
    )
