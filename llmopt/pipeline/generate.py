"""Text from an artifact in onnxruntime, or from a model in torch."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from llmopt.artifact import load_manifest
from llmopt.engine.base import Engine, Logits
from llmopt.engine.ort_stages import FORMAT as STAGES_FORMAT
from llmopt.errors import LlmoptError, UsageError
from llmopt.export.genai import stop_tokens
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.families import spec_from_config
from llmopt.model.json_file import read_object
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import CONFIG, GENERATION_CONFIG, open_source
from llmopt.model.spec import ModelSpec
from llmopt.model.tokenizer import Tokenizer
from llmopt.pipeline.baseline import in_transformers, is_artifact, require_onnx
from llmopt.pipeline.baseline import open_engine as open_artifact
from llmopt.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What to generate from. `chat` None uses the chat template if there is one; temperature 0 is greedy."""

    model: str
    prompt: str
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    chat: bool | None = None
    system: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    threads: int = 1


def generate(request: GenerateRequest, progress: Progress) -> Iterator[str]:
    """Pieces of text as they come.

    Raises:
        LlmoptError: the model does not open, the prompt is empty or too long, or the logits are not finite.
    """
    with ExitStack() as stack:
        engine, tokenizer, spec, generation = open_engine(request, stack, progress)
        ids = prompt_ids(request, tokenizer)
        longest = longest_sequence(spec)
        if len(ids) >= longest:
            raise UsageError(f"the prompt has {len(ids)} tokens, and the model reads {longest}", hint="shorten it")
        if (room := longest - len(ids)) < request.max_tokens:
            progress.say(f"the model reads {longest} tokens: behind this prompt there is room for {room}")
        decoded, stops = tokenizer.stream(ids), stop_tokens(spec, generation)
        for number, token in enumerate(sample(engine, ids, len(ids) + min(room, request.max_tokens), request)):
            if token in stops:
                if not number:
                    progress.say("the model ended at once: it has nothing to say behind this prompt")
                return
            yield decoded.push(token)


def open_engine(
    request: GenerateRequest, stack: ExitStack, progress: Progress
) -> tuple[Engine, Tokenizer, ModelSpec, Mapping[str, Any]]:
    """An artifact in its engine, a model in torch; with what its generation_config.json says."""
    if is_artifact(request.model):
        folder = Path(request.model)
        manifest = load_manifest(folder, verify=True)
        if not in_transformers(manifest) and manifest.format != STAGES_FORMAT:
            require_onnx(manifest, request.model)
        config = read_object(folder / CONFIG)
        generation = folder / GENERATION_CONFIG
        said = read_object(generation) if generation.is_file() else {}
        return open_artifact(folder, request.threads), Tokenizer.from_folder(folder), spec_from_config(config), said
    import torch  # noqa: PLC0415 (artifacts run without it)

    from llmopt.engine.torch import TorchEngine  # noqa: PLC0415 (likewise)

    torch.set_num_threads(request.threads)
    source = open_source(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code, progress=progress
    )
    folder = source.folder or Path(stack.enter_context(TemporaryDirectory()))
    if source.folder is None:
        source.write_tokenizer(folder)
    checkpoint = stack.enter_context(open_checkpoint(source))
    engine = TorchEngine(source.spec, checkpoint)
    return engine, Tokenizer.from_folder(folder), source.spec, source.generation_config


def prompt_ids(request: GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    """The prompt in tokens: through the chat template, or as text to continue.

    Raises:
        UsageError: there is nothing in it.
    """
    chat = tokenizer.has_chat_template if request.chat is None else request.chat
    if chat:
        system = [{"role": "system", "content": request.system}] if request.system is not None else []
        return tokenizer.encode(tokenizer.chat([*system, {"role": "user", "content": request.prompt}]))
    if request.system is not None:
        raise UsageError("--system needs a chat template, and this model has none", hint="leave it out")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + tokenizer.encode(request.prompt)
    if not ids:
        raise UsageError("the prompt is empty", hint="give at least a word")
    return ids


def sample(engine: Engine, ids: list[int], capacity: int, request: GenerateRequest) -> Iterator[int]:
    """Token after token, until the sequence is full."""
    rng = np.random.default_rng(request.seed)
    stream = engine.stream(capacity)
    logits = stream.feed(np.array(ids, np.int64))
    for _ in range(capacity - len(ids)):
        token = choose(logits, request.temperature, request.top_p, rng)
        yield token
        logits = stream.feed(np.array([token], np.int64))


def choose(logits_V: Logits, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The most likely token at temperature 0; else one drawn from the smallest set that holds `top_p` of the whole.

    Raises:
        LlmoptError: the logits are not finite.
    """
    if not np.isfinite(logits_V).all():
        raise LlmoptError("the model's logits are not finite", hint="llmopt bench compares it with its source")
    if temperature == 0:
        return int(logits_V.argmax())
    scaled: np.ndarray[Any, np.dtype[np.float64]] = logits_V.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order]) / weights.sum()
    kept = order[: 1 + int(np.searchsorted(cumulative, min(top_p, math.nextafter(1, 0))))]
    return int(rng.choice(kept, p=weights[kept] / weights[kept].sum()))
