"""A plan as ONNX graphs, one for each stage: written block by block, and held against torch before they appear."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from llmopt import __version__
from llmopt.artifact import MANIFEST, MODEL_CARD, Manifest, Source, check_free_disk, staged, write_json, write_manifest
from llmopt.engine.ort import LOGITS_AT
from llmopt.engine.ort_stages import FORMAT, HIDDEN, IDS, LOGITS, MASK, NEXT_HIDDEN, SCHEMA, STAGES, StageFile
from llmopt.engine.segments import run_in_segments
from llmopt.errors import UnsupportedError, VerificationError
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.kernels import default_kernel
from llmopt.export.onnx.levels import in_float32
from llmopt.export.onnx.stage import Stage
from llmopt.export.stages import stages_card
from llmopt.measure.host import versions
from llmopt.model.checkpoint import Tensors, open_checkpoint
from llmopt.model.source import CONFIG, GENERATION_CONFIG, QUANTIZATION, ModelSource
from llmopt.model.spec import ModelSpec, TensorSpec
from llmopt.model.storage import quantized_bytes
from llmopt.partition.plan import Plan
from llmopt.pipeline.calibration import Weights
from llmopt.pipeline.prepare import source_entry
from llmopt.pipeline.stored import stored_format, stored_schemes
from llmopt.pipeline.stored_weights import by_weight, open_stored
from llmopt.pipeline.verify import FLOAT_TOLERANCE, Reference
from llmopt.progress import Progress
from llmopt.quantize.grid import HALF_SCALE
from llmopt.quantize.rtn import Rtn
from llmopt.quantize.scheme import Scheme, parse_scheme
from llmopt.quantize.weights import QuantizedWeight

_WINDOW = 32  # tokens by which a stage is checked

Read = Callable[[TensorSpec], Tensor | QuantizedWeight]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesResult:
    """Where the graphs are, what each is for, and the largest relative error of what one gives."""

    folder: str
    stages: tuple[StageFile, ...]
    relative_error: float

    def to_json(self) -> dict[str, Any]:
        """What `--json` shows."""
        return asdict(self)


def require_stages(plan: Plan) -> None:
    """See that each stage of a plan can be one graph.

    Raises:
        UnsupportedError: one has several devices, or no block.
    """
    for number, stage in enumerate(plan.stages):
        if stage.tp > 1:
            what = f"a graph is for one device, and stage {number} has {stage.tp}"
            raise UnsupportedError(what, hint="make the plan with --tp 1")
        if stage.layers[0] == stage.layers[1]:
            raise UnsupportedError(f"stage {number} has no blocks", hint="give one of your own with --split")


def write_stages(plan: Plan, source: ModelSource, folder: Path, progress: Progress, *, force: bool) -> StagesResult:
    """Write the graphs of a plan.

    Weights have the plan's schemes: those that they are stored in, or else, rounded to nearest, those that it asks for.
    What has no scheme is float32, whatever the dtype of the plan.

    Raises:
        UnsupportedError: see `require_stages`; or there is no kernel for the model's attention.
        VerificationError: a graph computes something else than torch.
        LlmoptError: something else is in the folder, the disk is too small, or a weight cannot be read.
    """
    require_stages(plan)
    spec, schemes = source.spec, {name: parse_scheme(text) for name, text in plan.schemes.items()}
    names = [spec.embedding.name, *(linear.name for linear in spec.linears())]
    check_free_disk(folder, quantized_bytes(spec, {name: schemes.get(name) for name in names}))
    with staged(folder, force=force) as partial:
        with _reading(source, schemes) as read, progress.task("writing stages", total=len(plan.stages)) as task:
            writing = _Writing(plan, spec, read, partial)
            for number in range(len(plan.stages)):
                writing.stage(number)
                task.advance()
        files = tuple(writing.files)
        _write_companions(plan, source, files, partial)
        made = Manifest(source=_made_from(source), format=FORMAT, versions={"llmopt": __version__, **versions()})
        write_manifest(partial, made)
    return StagesResult(folder=str(folder), stages=files, relative_error=writing.relative_error)


class _Writing:
    """Stage after stage, with the hidden states that torch has behind the blocks so far."""

    def __init__(self, plan: Plan, spec: ModelSpec, read: Read, folder: Path) -> None:
        self._plan, self._spec, self._read, self._folder = plan, spec, read, folder
        self._devices = tuple(stage.devices[0] for stage in plan.stages)
        length = min(_WINDOW, spec.context_length)
        self._ids_T = np.random.default_rng(0).integers(0, spec.vocab_size, length)
        self._reference = Reference(spec, [self._ids_T], round_activations=False)
        self.files: list[StageFile] = []
        self.relative_error = 0.0

    def stage(self, number: int) -> None:
        """Write one, and see that it computes what torch does."""
        stage, layers = Stage(number=number, devices=self._devices), self._plan.stages[number].layers
        with closing(DecoderGraph(self._folder, self._spec, default_kernel, stage)) as graph:
            if stage.first:
                part = self._part(self._spec.embedding.tensors())
                graph.embedding(part)
                self._reference.embedding(part)
                before = self._ids_T[None]
            else:
                before = self._reference.hidden[0].numpy()
            for block in self._spec.blocks[slice(*layers)]:
                part = self._part(block.tensors())
                graph.block(block, part)
                self._reference.block(block, part)
            expected = self._reference.hidden[0].numpy()
            if stage.last:
                part = self._part(_head_tensors(self._spec))
                graph.head(part)
                self._reference.head(part)
                expected = self._reference.logits(0)[None]
            else:
                graph.hidden()
            graph.save(__version__)
        self.files.append(
            StageFile(
                file=stage.file,
                data=f"{stage.file}.data",
                device=self._devices[number],
                layers=layers,
                reads=IDS if stage.first else HIDDEN,
                gives=LOGITS if stage.last else NEXT_HIDDEN,
            )
        )
        self._check(self.files[-1], before, expected)

    def _part(self, tensors: Iterable[TensorSpec]) -> Weights:
        return {tensor.name: self._read(tensor) for tensor in tensors}

    def _check(self, file: StageFile, before: Any, expected: Any) -> None:
        """Run a graph as it is in float32, a few nodes at a time."""
        model = onnx.load(self._folder / file.file, load_external_data=False)
        tokens = len(self._ids_T)
        feed = {file.reads: before, MASK: np.ones((1, tokens), np.int64), LOGITS_AT: np.arange(tokens)}
        for node in model.graph.input:
            if node.name.startswith("past_key_values."):
                attention = self._spec.blocks[0].attention
                feed[node.name] = np.zeros((1, attention.kv_heads, 0, attention.head_dim), np.float32)
        found = run_in_segments(in_float32(model), self._folder, [feed], file.gives, threads=1)[0]
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        self.relative_error = max(self.relative_error, error)
        if not error <= FLOAT_TOLERANCE:
            what = f"what {file.file} gives is {error:.2g} of its norm away from what torch has there"
            raise VerificationError(what, hint="please report it, with the plan")


@contextmanager
def _reading(source: ModelSource, schemes: Mapping[str, Scheme]) -> Iterator[Read]:
    """Weights as graphs take them, [out, in]: in their own integers, or rounded to nearest."""
    stored = stored_schemes(source)
    linears = by_weight(source.spec, schemes)
    turned = {linear.weight.name for linear in source.spec.linears() if linear.transposed}
    if stored is not None:
        with open_stored(source, stored) as weights:
            yield lambda t: weights.quantized(t) if t.name in weights.linears else _floats(weights, t, turned)
        return
    with open_checkpoint(source) as checkpoint:
        method = Rtn(scales=HALF_SCALE)

        def read(tensor: TensorSpec) -> Tensor | QuantizedWeight:
            values = _floats(checkpoint, tensor, turned)
            return method.quantize(values, linears[tensor.name][1]) if tensor.name in linears else values

        yield read


def _floats(tensors: Tensors, tensor: TensorSpec, turned: set[str]) -> Tensor:
    values = tensors.read(tensor)
    return values.T.contiguous() if tensor.name in turned else values


def _head_tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    """With the table of a tied head, which `ModelSpec` has with the embedding."""
    yield from spec.tensors_before_head()
    yield spec.head.weight
    if spec.head.bias:
        yield TensorSpec(f"{spec.head.name}.bias", (spec.head.out_features,))


def _made_from(source: ModelSource) -> Source:
    """The model as a manifest names it. A graph is known by its own manifest, which has the hashes of its files."""
    if source.folder is None or stored_format(source) != "onnx":
        return source_entry(source)
    fingerprint = hashlib.sha256((source.folder / MANIFEST).read_bytes()).hexdigest()
    return Source(name=Path(source.name).name, fingerprint=fingerprint)


def _write_companions(plan: Plan, source: ModelSource, files: tuple[StageFile, ...], folder: Path) -> None:
    write_json(folder / CONFIG, {name: value for name, value in source.config.items() if name != QUANTIZATION})
    if source.generation_config:
        write_json(folder / GENERATION_CONFIG, source.generation_config)
    if source.gguf is not None or source.tokenizer_files():
        source.write_tokenizer(folder)
    name = _made_from(source).name
    entries = [asdict(file) for file in files]
    write_json(folder / STAGES, {"schema": SCHEMA, "model": name, "schemes": dict(plan.schemes), "stages": entries})
    (folder / MODEL_CARD).write_text(stages_card(name, files), encoding="utf-8")
