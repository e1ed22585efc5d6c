"""The baseline: the unquantized model under the same engine, exported once and kept."""

import re
from pathlib import Path

from llmopt import __version__
from llmopt.artifact import MANIFEST, Manifest, check_free_disk, load_manifest, staged, write_manifest
from llmopt.engine.base import Engine
from llmopt.engine.ort import OrtEngine
from llmopt.engine.ort_stages import FORMAT as STAGES_FORMAT
from llmopt.engine.ort_stages import StagesEngine
from llmopt.errors import ArtifactError, UsageError
from llmopt.export.opening import CAST
from llmopt.measure.host import versions
from llmopt.model.source import open_source
from llmopt.pipeline.cache import cache_folder, writable_cache
from llmopt.pipeline.export import Export, export
from llmopt.pipeline.formats.onnx import ONNX, Onnx, estimated_bytes
from llmopt.pipeline.formats.registry import find_format
from llmopt.pipeline.prepare import source_entry
from llmopt.pipeline.soundness import open_tokenizer
from llmopt.pipeline.tuning import measured_on, tuning
from llmopt.progress import Progress
from llmopt.quantize.assign import Assignment

BASELINES = "baselines"  # in the cache


def is_artifact(name: str) -> bool:
    """Whether a model's name is the folder of an artifact."""
    return (Path(name) / MANIFEST).is_file()


def float_artifact(model: str, *, revision: str | None, threads: int, progress: Progress) -> Path:
    """The folder of a model as a float32 ONNX artifact; an artifact's own folder if that is what `model` names.

    `open_engine` opens either.

    Raises:
        LlmoptError: the model or artifact is not there, not supported or damaged, or the disk is full.
    """
    if is_artifact(model):
        manifest = load_manifest(Path(model), verify=True)
        if not in_transformers(manifest):
            require_onnx(manifest, model)
        return Path(model)
    source = open_source(model, revision=revision, progress=progress)
    names = [source.spec.embedding.name, *(linear.name for linear in source.spec.linears())]
    assignments = {name: Assignment(name=name, scheme=None, reason="the baseline") for name in names}
    manifest = Manifest(
        source=source_entry(source),
        format=ONNX.name,
        seed=0,
        kernels=measured_on(threads),
        versions={"llmopt": __version__, **versions()},
    )
    folder = cache_folder() / BASELINES / f"{printable(source.name)}-{manifest.key[:16]}"
    if _is_whole(folder):
        return folder
    open_tokenizer(source)  # a mistake in it should name the model's folder, not the one that is being written
    writable_cache(BASELINES)
    check_free_disk(folder.parent, estimated_bytes(source.spec, assignments))
    # A baseline reads prompts as fast as it can, too: what candidates gain is not what cutting a prompt gains.
    format_ = Onnx(tuning=tuning(threads, None, progress))
    job = Export(source=source, assignments=assignments, method=None, seed=0, threads=threads, format=format_)
    # Another process may be writing the same baseline: whichever is done last stays, and both are the same.
    with staged(folder, force=True) as partial:
        export(job, partial, progress)
        write_manifest(partial, manifest)
    return folder


def in_transformers(manifest: Manifest) -> bool:
    """Whether an artifact is a checkpoint of floats, which transformers computes with as it ships."""
    return manifest.method == CAST and manifest.format == "hf"


def open_engine(path: Path, threads: int) -> Engine:
    """An artifact as its users open it.

    Raises:
        ArtifactError: it does not open.
    """
    manifest = load_manifest(path)
    if manifest.format == STAGES_FORMAT:
        return StagesEngine(path, threads)
    if in_transformers(manifest):
        from llmopt.engine.cast import CastEngine  # noqa: PLC0415 (torch, which others need not wait for)

        return CastEngine(path, threads).cast()
    return OrtEngine(path, threads)


def require_onnx(manifest: Manifest, name: str) -> None:
    """See that onnxruntime, which measures and generates here, opens an artifact.

    Raises:
        UsageError: another program does.
    """
    if manifest.format == STAGES_FORMAT:
        hint = "llmopt generate runs it; measure the model that it was cut from"
        raise UsageError(f"{name} is cut into stages, which are not measured as one model", hint=hint)
    if manifest.format != ONNX.name:
        raise UsageError(
            f"onnxruntime does not open {name}: its format is {manifest.format}",
            hint=f"open it with {find_format(manifest.format).engine}, or quantize with --format {ONNX.name}",
        )


def printable(name: str) -> str:
    """The last part of a model's name, as a part of a folder's: it appears where progress is shown."""
    return re.sub(r"[^\w.-]", "_", Path(name).resolve().name if Path(name).exists() else name.rpartition("/")[2])


def _is_whole(folder: Path) -> bool:
    try:
        load_manifest(folder, verify=True)
    except ArtifactError:
        return False
    return True
