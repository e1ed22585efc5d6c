"""What an artifact really lost, on text that nothing was fitted to: onnxruntime as it ships, against float in torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.calibrate.windows import TokenWindows
from llmopt.engine.blocks import RotaryTables
from llmopt.engine.ort import OrtEngine
from llmopt.engine.torch import TorchEngine
from llmopt.measure.accuracy import AccuracySums, Bounds, candidate_side
from llmopt.measure.tokens import score
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.source import ModelSource
from llmopt.progress import Progress
from llmopt.report.results import Delta, Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """KL divergence in nats a token, and the change of perplexity, with 95 % intervals where there are documents."""

    kl: Measurement
    perplexity: Delta

    def to_json(self) -> dict[str, Any]:
        """The form that a report holds."""
        return {"kl_divergence": self.kl.to_json(), "perplexity_change": self.perplexity.to_json()}


def measure_loss(
    source: ModelSource, folder: Path, text: TokenWindows, *, threads: int, seed: int, progress: Progress
) -> HeldOutLoss:
    """Hold the artifact in `folder` against its source. The windows of `text` have one length."""
    spec = source.spec
    ids_BT = np.minimum(np.stack(text.ids), spec.vocab_size - 1)
    names, cluster = np.unique(np.concatenate(text.cluster), return_inverse=True)
    cluster_BT = cluster.reshape(ids_BT.shape)
    sums = AccuracySums(len(names))
    with (
        open_checkpoint(source) as checkpoint,
        progress.task("what it lost, on text that was held out", total=len(ids_BT)) as task,
        torch.inference_mode(),
    ):
        float_model = TorchEngine(spec, checkpoint, keep=False)
        hidden_BTH = float_model.hidden(torch.from_numpy(ids_BT), RotaryTables(spec, ids_BT.shape[1]))
        artifact = OrtEngine(folder, threads)
        for ids_T, hidden_TH, cluster_T in zip(ids_BT, hidden_BTH, cluster_BT, strict=True):
            expected_TV = float_model.head(hidden_TH[None])[0, :-1].numpy()
            actual_TV = artifact.logits(ids_T[None])[0, :-1]
            sums.add(score(expected_TV, actual_TV, ids_T[1:]), cluster_T[1:])
            task.advance()
    side = candidate_side(sums, Bounds(0.0, 0.0), seed)
    kl, perplexity = side.metrics["kl_divergence"], side.deltas["perplexity"]
    assert kl is not None
    assert perplexity is not None
    return HeldOutLoss(kl=kl, perplexity=perplexity)
