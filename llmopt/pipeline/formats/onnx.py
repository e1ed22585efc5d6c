"""ONNX: a graph for onnxruntime, and what onnxruntime-genai wants beside it."""

import math
from dataclasses import dataclass
from pathlib import Path

from llmopt import __version__
from llmopt.artifact import write_json
from llmopt.engine.ort import GENAI_CONFIG
from llmopt.engine.segments import SEGMENT_NODES
from llmopt.export.genai import genai_config
from llmopt.export.onnx.attention import require_heads
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.export.onnx.kernels import default_kernel
from llmopt.export.onnx.one_token import LARGEST_BYTES
from llmopt.model.json_file import read_object
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import CONFIG, ModelSource
from llmopt.model.spec import Block, Linear, ModelSpec
from llmopt.model.storage import quantized_bytes
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.formats.base import Assignments
from llmopt.pipeline.repair import repaired
from llmopt.pipeline.tuning import PROMPT, Tuning
from llmopt.pipeline.verify import References, Verification, verify
from llmopt.progress import Progress
from llmopt.quantize.assign import EIGHT_BITS, TableRule
from llmopt.quantize.execute import Rounding, round_rows
from llmopt.quantize.grid import HALF_SCALE, ScaleRule

FLOAT_BYTES = 4
BLOCK_NODES = 24  # about as many nodes of a graph are a block
NODES_BYTES = 2**19  # that onnxruntime takes for the nodes of a block, beside their weights


@dataclass(frozen=True, kw_only=True)
class Onnx:
    """The format `onnx`; `tuning` chooses kernels, None the default ones."""

    tuning: Tuning | None = None
    name: str = "onnx"
    engine: str = "onnxruntime"
    tables: TableRule = EIGHT_BITS
    rounding: Rounding = round_rows
    before_head: bool = True

    def scales(self, spec: ModelSpec) -> ScaleRule:
        """Signed, which kernels take, and in half precision, as they are stored."""
        return HALF_SCALE

    def check(self, spec: ModelSpec) -> None:
        """See that attention's kernel takes such heads."""
        require_heads(spec)

    def check_layers(self, spec: ModelSpec, assignments: Assignments) -> None:
        """Any layer can have any scheme."""

    def estimated_bytes(self, spec: ModelSpec, assignments: Assignments) -> int:
        """See `estimated_bytes`."""
        return estimated_bytes(spec, assignments)

    def verification_bytes(
        self, spec: ModelSpec, assignments: Assignments, output_bytes: int, logits_bytes: int
    ) -> int:
        """A segment's blocks as floats, in its graph and as kernels have them; or the graph as it ships, and logits.

        In that, integer products that are small have their weights twice.
        """
        block = FLOAT_BYTES * max(sum(tensor.count for tensor in block.tensors()) for block in spec.blocks)
        segment = math.ceil(SEGMENT_NODES / BLOCK_NODES) * block
        twice = sum(linear.weight.count for linear in spec.linears() if _has_short_way(linear, assignments))
        return max(2 * segment, output_bytes + twice + NODES_BYTES * len(spec.blocks) + logits_bytes)

    def write_companions(self, source: ModelSource, assignments: Assignments, folder: Path) -> None:
        """The model's own config, and that of onnxruntime-genai where it knows the family."""
        write_json(folder / CONFIG, source.config)
        config = genai_config(source.spec, source.generation_config, GRAPH_FILE)
        if config is not None:
            write_json(folder / GENAI_CONFIG, config)

    def writer(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> "GraphWriter":
        """Begin the graph and its data file."""
        choose = default_kernel if self.tuning is None else self.tuning.kernel
        return GraphWriter(DecoderGraph(folder, spec, choose))

    def verify(self, folder: Path, references: References, threads: int, progress: Progress) -> Verification:
        """See `llmopt.pipeline.verify`, and `llmopt.pipeline.repair` for what is done about flipped tokens."""
        found = verify(folder, references.exact, references.rounded, threads, progress)
        return repaired(found, folder, references.exact, threads)

    def finish(self, spec: ModelSpec, assignments: Assignments, folder: Path) -> None:
        """Tell onnxruntime-genai in what pieces to read a prompt, where that is faster."""
        path = folder / GENAI_CONFIG
        if self.tuning is None or not path.is_file() or longest_sequence(spec) < PROMPT:
            return
        size = self.tuning.chunk(prefill_name(spec, assignments), folder, spec.vocab_size)
        if size is not None:
            config = read_object(path)
            write_json(path, config | {"search": config["search"] | {"chunk_size": size}})


@dataclass(frozen=True)
class GraphWriter:
    """A graph; floats are float32 in it, and come back as they are."""

    graph: DecoderGraph

    def embedding(self, weights: Weights) -> Weights:
        """See `Writer`."""
        self.graph.embedding(weights)
        return weights

    def block(self, block: Block, weights: Weights) -> Weights:
        """See `Writer`."""
        self.graph.block(block, weights)
        return weights

    def head(self, weights: Weights) -> Weights:
        """See `Writer`."""
        self.graph.head(weights)
        return weights

    def save(self) -> None:
        """Write the graph beside its data."""
        self.graph.save(__version__)

    def close(self) -> None:
        """See `Writer`."""
        self.graph.close()


def _has_short_way(linear: Linear, assignments: Assignments) -> bool:
    scheme = assignments[linear.name].scheme
    return scheme is not None and scheme.activation_bits == 8 and linear.weight.count <= LARGEST_BYTES


def prefill_name(spec: ModelSpec, assignments: Assignments) -> str:
    """What decides how fast a prompt is read: the shape of the model, and its schemes."""
    block = spec.blocks[0]
    heads = f"{block.attention.heads} and {block.attention.kv_heads} heads of {block.attention.head_dim}"
    schemes = {"float" if item.scheme is None else item.scheme.name for item in assignments.values()}
    return (
        f"prompt of {PROMPT} tokens, {len(spec.blocks)} blocks of {spec.hidden_size}, {heads}, MLPs of "
        f"{block.mlp.size}, {' and '.join(sorted(schemes))}"
    )


def estimated_bytes(spec: ModelSpec, assignments: Assignments) -> int:
    """What the model takes on disk under its layers' schemes, before any weight is read."""
    return quantized_bytes(spec, {name: item.scheme for name, item in assignments.items()})


ONNX = Onnx()
