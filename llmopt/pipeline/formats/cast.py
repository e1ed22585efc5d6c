"""The formats of a cast model: what is written of a plan, and how the result is checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llmopt.artifact import write_json
from llmopt.engine.cast import CastEngine
from llmopt.engine.ort import GENAI_CONFIG, OrtEngine
from llmopt.errors import ArtifactError, UnsupportedError, UsageError, VerificationError, near_match
from llmopt.export.checkpoint.compressed_tensors import CompressedTensors
from llmopt.export.genai import genai_config
from llmopt.export.onnx.attention import require_heads
from llmopt.export.onnx.decoder import DecoderGraph
from llmopt.export.onnx.graph import GRAPH_FILE
from llmopt.model.json_file import read_object
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import CONFIG, ModelSource
from llmopt.model.spec import ModelSpec, TensorSpec
from llmopt.model.storage import rotary_values
from llmopt.pipeline.cast_check import CastReferences, check
from llmopt.pipeline.formats.base import Writer
from llmopt.pipeline.formats.cast_writer import CastWriter, StoredOrder
from llmopt.pipeline.formats.hf import HF
from llmopt.pipeline.formats.onnx import ONNX, GraphWriter, prefill_name
from llmopt.pipeline.tuning import PROMPT, Tuning
from llmopt.pipeline.verify import Verification, compare, compare_rewritten
from llmopt.precision.cast import DTYPES, CastPlan, module_of
from llmopt.precision.short import WORDS
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment

SHORT_BYTES = 2
WIDENED = 3.5  # times the size of its files is what onnxruntime takes, where all kernels are of float32


class CastFormat(Protocol):
    """One format. `engine` is the program that opens it; `short_tables`: whether it stores rotary tables in 16 bits."""

    @property
    def name(self) -> str:
        """The word that people type and manifests hold."""
        ...

    @property
    def engine(self) -> str:
        """The program that opens it."""
        ...

    @property
    def short_tables(self) -> bool:
        """Whether rotary tables are stored, in the dtype of the attention that reads them."""
        ...

    def check(self, spec: ModelSpec, dtype_name: str) -> None:
        """See that such a model can be written in that dtype, and opened afterwards.

        Raises:
            LlmoptError: it cannot.
        """
        ...

    def estimated_bytes(self, spec: ModelSpec, plan: CastPlan | None) -> int:
        """What the weights take on disk; without a plan, if nothing is kept."""
        ...

    def verification_bytes(self, spec: ModelSpec, output_bytes: int, logits_bytes: int) -> int:
        """What `verify` takes of memory, where model files and the reference's logits take so much."""
        ...

    def write_companions(self, source: ModelSource, plan: CastPlan, folder: Path) -> None:
        """Write what lies beside the weights, except for the tokenizer."""
        ...

    def writer(self, spec: ModelSpec, plan: CastPlan, folder: Path) -> Writer:
        """Begin to write the weights; they come back in the dtypes that they are stored in."""
        ...

    def verify(
        self, folder: Path, references: CastReferences, plan: CastPlan, threads: int, progress: Progress
    ) -> Verification:
        """Open what was written, and hold it against the references.

        Raises:
            VerificationError: it computes something else.
        """
        ...

    def finish(self, spec: ModelSpec, tuning: Tuning | None, folder: Path) -> None:
        """Decide what is decided by running what was written, once it is known to be right."""
        ...


@dataclass(frozen=True, kw_only=True)
class CastHf:
    """Safetensors whose tensors have the dtypes of their modules.

    The config says the cast's dtype if all modules have it. Else it says float32, in which transformers then computes,
    rightly: it has one dtype for all, and what was kept would overflow in the other.
    """

    name: str = "hf"
    engine: str = "transformers"
    short_tables: bool = False

    def check(self, spec: ModelSpec, dtype_name: str) -> None:
        """Anything can be stored."""

    def estimated_bytes(self, spec: ModelSpec, plan: CastPlan | None) -> int:
        """Every tensor; only the header is left out."""
        return tensor_bytes(spec, plan)

    def verification_bytes(self, spec: ModelSpec, output_bytes: int, logits_bytes: int) -> int:
        """As for quantized weights: the whole model in float32."""
        return HF.verification_bytes(spec, unassigned(spec), output_bytes, logits_bytes)

    def finish(self, spec: ModelSpec, tuning: Tuning | None, folder: Path) -> None:
        """Nothing is left to decide."""

    def write_companions(self, source: ModelSource, plan: CastPlan, folder: Path) -> None:
        """The model's config with the dtype that transformers is to load it in."""
        own = {name: value for name, value in source.config.items() if name not in {"torch_dtype", "dtype"}}
        write_json(folder / CONFIG, own | {"dtype": "float32" if plan.kept else WORDS[plan.dtype_name]})

    def writer(self, spec: ModelSpec, plan: CastPlan, folder: Path) -> "CastWriter":
        """Begin the files."""
        schemes = {linear.name: None for linear in spec.linears()}
        files = StoredOrder(
            folder,
            spec,
            schemes,
            CompressedTensors(plan.dtype),
            lambda tensor: plan.dtype_of(module_of(spec, tensor.name)),
        )
        return CastWriter(files, spec, plan)

    def verify(
        self, folder: Path, references: CastReferences, plan: CastPlan, threads: int, progress: Progress
    ) -> Verification:
        """Open it in transformers, in float32, and then each module in its own dtype."""
        with progress.task("comparing transformers with the model in torch", total=2) as task:
            try:
                engine = CastEngine(folder, threads)
            except ArtifactError as error:
                raise VerificationError(error.what, where=error.where) from error
            in_float32 = compare(engine, references.exact)
            task.advance()
            found = check(references, in_float32, engine.cast(), plan.dtype_name)
            task.advance()
        return found


@dataclass(frozen=True, kw_only=True)
class CastOnnx:
    """A graph for onnxruntime with float16 tensors, and Casts around what stays float32."""

    name: str = "onnx"
    engine: str = "onnxruntime"
    short_tables: bool = True

    def check(self, spec: ModelSpec, dtype_name: str) -> None:
        """See that there are kernels: onnxruntime's CPU provider has next to none for bfloat16.

        Of 1.32, MatMul, Add, Mul, GroupQueryAttention and others do not open with it.
        """
        require_heads(spec)
        if DTYPES[dtype_name] is not torch.float16:
            raise UnsupportedError(
                f"onnxruntime's CPU provider, in which graphs are checked, has no {dtype_name} kernels for MatMul, Mul "
                "or GroupQueryAttention",
                hint="--dtype fp16, or --format hf",
            )

    def estimated_bytes(self, spec: ModelSpec, plan: CastPlan | None) -> int:
        """Every tensor and the rotary tables; the nodes are left out."""
        return tensor_bytes(spec, plan) + SHORT_BYTES * rotary_values(spec)

    def verification_bytes(self, spec: ModelSpec, output_bytes: int, logits_bytes: int) -> int:
        """As for quantized weights; but onnxruntime makes floats of all, where the processor has no float16."""
        return ONNX.verification_bytes(spec, unassigned(spec), int(WIDENED * output_bytes), logits_bytes)

    def finish(self, spec: ModelSpec, tuning: Tuning | None, folder: Path) -> None:
        """Tell onnxruntime-genai in what pieces to read a prompt, as for quantized models and baselines."""
        path = folder / GENAI_CONFIG
        if tuning is None or not path.is_file() or longest_sequence(spec) < PROMPT:
            return
        size = tuning.chunk(f"{prefill_name(spec, unassigned(spec))}, cast", folder, spec.vocab_size)
        if size is not None:
            config = read_object(path)
            write_json(path, config | {"search": config["search"] | {"chunk_size": size}})

    def write_companions(self, source: ModelSource, plan: CastPlan, folder: Path) -> None:
        """The model's own config, and that of onnxruntime-genai where it knows the family and the cache is of one
        dtype, for it gives all blocks the same.
        """
        write_json(folder / CONFIG, source.config)
        caches = {plan.dtype_of(block.attention.inputs[0].name) for block in source.spec.blocks}
        config = genai_config(source.spec, source.generation_config, GRAPH_FILE)
        if config is not None and len(caches) == 1:
            write_json(folder / GENAI_CONFIG, config)

    def writer(self, spec: ModelSpec, plan: CastPlan, folder: Path) -> "CastWriter":
        """Begin the graph and its data file."""
        return CastWriter(GraphWriter(DecoderGraph(folder, spec)), spec, plan)

    def verify(
        self, folder: Path, references: CastReferences, plan: CastPlan, threads: int, progress: Progress
    ) -> Verification:
        """Run the graph rewritten to float32, and as it ships."""
        with progress.task("comparing the graph with the model in torch", total=2) as task:
            in_float32 = compare_rewritten(folder, references.exact, threads, integers=False)
            task.advance()
            found = check(references, in_float32, OrtEngine(folder, threads), plan.dtype_name)
            task.advance()
        return found


CAST_FORMATS: Mapping[str, CastFormat] = {known.name: known for known in (CastOnnx(), CastHf())}


def find_cast_format(name: str) -> CastFormat:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in CAST_FORMATS:
        raise UsageError(f"there is no format {name!r} to cast to", hint=near_match(name, CAST_FORMATS))
    return CAST_FORMATS[name]


def unassigned(spec: ModelSpec) -> dict[str, Assignment]:
    """No layer has a scheme."""
    names = (spec.embedding.name, *(linear.name for linear in spec.linears()))
    return {name: Assignment(name=name, scheme=None) for name in names}


def tensor_bytes(spec: ModelSpec, plan: CastPlan | None) -> int:
    """All tensors in the dtypes of a plan, or in 16 bits."""

    def size(tensor: TensorSpec) -> int:
        return SHORT_BYTES if plan is None else plan.dtype_of(module_of(spec, tensor.name)).itemsize

    return sum(tensor.count * size(tensor) for tensor in spec.tensors())
