"""Finished parts of a model as bytes, and a journal of them, from which a run that was stopped goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from llmopt.artifact import Journal, Manifest
from llmopt.engine.base import TokenIds
from llmopt.measure.host import describe_host
from llmopt.model.spec import ModelSpec
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.ranks import ALONE, Ranks
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment
from llmopt.quantize.scheme import parse_scheme
from llmopt.quantize.weights import QuantizedWeight
from llmopt.report.results import LayerResult

EMBEDDING, HEAD = "embedding", "head"
# Of a quantized weight, behind its name; no tensor of a checkpoint has a colon in its name.
_CODES, _SCALES, _ZERO_POINTS = ":codes", ":scales", ":zero-points"
_TOLD = "part"  # in the metadata: one entry, for safetensors writes several in no certain order


@dataclass(frozen=True, slots=True)
class Part:
    """Some tensors by their checkpoint names, linears as [out, in], and what became of each layer among them."""

    weights: Weights
    layers: list[LayerResult]


class PartJournal:
    """Parts in a journal, of one choice of schemes, one text in tokens and one basis of the residual stream.

    A budget may take several choices; `turn` is the seed of a rotation, None for the basis as stored.
    """

    def __init__(
        self,
        journal: Journal,
        assignments: Mapping[str, Assignment],
        windows: Sequence[TokenIds],
        progress: Progress,
        turn: int | None = None,
    ) -> None:
        self.journal = journal
        self.progress = progress
        self.choice = choice_name(assignments, windows) + ("" if turn is None else f"-turn-{turn}")

    def read(self, name: str) -> Part | None:
        """A part that was finished; None if it was not, or has to be done again."""
        data = self.journal.read(self._file(name))
        if data is None and self.journal.has(self._file(name)):
            self.progress.say(f"the journal of {name} is damaged: it is done again")
        return None if data is None else part_from_bytes(data)

    def write(self, name: str, part: Part) -> None:
        """Keep a part."""
        self.journal.write(self._file(name), part_to_bytes(part))

    def announce(self, spec: ModelSpec) -> None:
        """Say where the work goes on, if it was begun before."""
        if not self.journal.has(self._file(EMBEDDING)):
            return
        left = [block for block in spec.blocks if not self.journal.has(self._file(block_name(block.index)))]
        place = f"block {left[0].index + 1} of {len(spec.blocks)}" if left else "the head"
        self.progress.say(f"resuming at {place}")

    def _file(self, name: str) -> str:
        return f"{self.choice}-{name}.safetensors"


def journal_key(manifest: Manifest, threads: int, ranks: Ranks = ALONE) -> str:
    """Hash of everything that decides the bytes: sums have another order with other threads and on other processors,
    and where other processes have a share of them.
    """
    host = describe_host(threads)
    causes = [manifest.key, *ranks.gather([threads, host["cpu"], host["isa"]])]
    return hashlib.sha256(json.dumps(causes).encode()).hexdigest()


def block_name(index: int) -> str:
    """What the journal calls a block."""
    return f"block-{index}"


def part_to_bytes(part: Part) -> bytes:
    """A part as a safetensors file, whose metadata hold schemes and results.

    Made in memory, because a full disk is an OSError when Python writes and an unnamed one when safetensors does.
    """
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, str] = {}
    for name, weight in part.weights.items():
        if isinstance(weight, Tensor):
            tensors[name] = weight.contiguous()
            continue
        schemes[name] = weight.scheme.name
        tensors[name + _CODES], tensors[name + _SCALES] = weight.codes_OI.contiguous(), weight.scales_OG.contiguous()
        if weight.zero_points_OG is not None:
            tensors[name + _ZERO_POINTS] = weight.zero_points_OG.contiguous()
    layers = [layer.to_json() for layer in part.layers]
    told = {"order": list(part.weights), "schemes": schemes, "layers": layers}
    return safetensors.torch.save(tensors, {_TOLD: json.dumps(told)})


def part_from_bytes(data: bytes) -> Part:
    """What `part_to_bytes` was given."""
    # Cloned into torch's own memory: products may round differently where a matrix begins elsewhere in a cache line.
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    header_bytes = int.from_bytes(data[:8], "little")
    told = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"][_TOLD])
    weights: Weights = {}
    for name in told["order"]:
        if name not in told["schemes"]:
            weights[name] = tensors[name]
            continue
        weights[name] = QuantizedWeight(
            scheme=parse_scheme(told["schemes"][name]),
            codes_OI=tensors[name + _CODES],
            scales_OG=tensors[name + _SCALES],
            zero_points_OG=tensors.get(name + _ZERO_POINTS),
        )
    return Part(weights, [LayerResult(**layer) for layer in told["layers"]])


def choice_name(assignments: Mapping[str, Assignment], windows: Sequence[TokenIds]) -> str:
    """A short hash of a choice of schemes, with reasons, and of a text in tokens."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(item) for item in assignments.values()]).encode())
    for ids_T in windows:
        digest.update(len(ids_T).to_bytes(8, "little"))
        digest.update(ids_T.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
