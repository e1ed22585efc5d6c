"""What a model is and costs, gathered into one value: what `llmopt inspect` shows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmopt.errors import UsageError
from llmopt.model import cost, parallel, storage
from llmopt.model.rotary import longest_sequence
from llmopt.model.source import ModelSource
from llmopt.model.spec import ModelSpec

SCHEMA = "llmopt.inspect/1"

# Long enough that attention and the cache count, short enough for any model.
DEFAULT_CONTEXT = 2048

# What each linear and embedding gets, by its name; None leaves it float32.
Plan = Mapping[str, storage.Grid | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedSize:
    """What the model files take under a scheme, where embedding and head get that of `tables`."""

    scheme: str
    tables: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A model described at `context` tokens.

    `stored_bytes` has the bytes in each type of a GGUF file, whose config names none; it is None for other models.
    """

    name: str
    revision: str | None
    spec: ModelSpec
    context: int
    parts: tuple[cost.Part, ...]
    prefill: cost.Work
    decode: cost.Work
    kv_bytes_per_token: int
    kv_bytes_at_context: int
    tensor_parallel: tuple[parallel.TensorParallel, ...]
    quantizable: tuple[storage.Quantizable, ...]
    predicted_sizes: tuple[PredictedSize, ...]
    stored_bytes: Mapping[str, int] | None = None

    @property
    def parameters(self) -> int:
        """All of them; a table that two layers share counts once."""
        return sum(part.parameters for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """Size of the weights in the dtype that the config names."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def windowed_blocks(self) -> int:
        """Blocks that see a window of the text, and cache no more than that."""
        return sum(block.attention.window is not None for block in self.spec.blocks)

    def to_json(self) -> dict[str, Any]:
        """The object that `llmopt inspect --json` prints."""
        return {
            "schema": SCHEMA,
            "model": self.name,
            "revision": self.revision,
            **_identity(self.spec),
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "stored_bytes": self.stored_bytes,
            "parts": [asdict(part) for part in self.parts],
            "context": self.context,
            "prefill": _work(self.prefill),
            "decode": _work(self.decode),
            "kv_cache": {
                "bytes_per_token": self.kv_bytes_per_token,
                "bytes_at_context": self.kv_bytes_at_context,
                "windowed_blocks": self.windowed_blocks,
            },
            "tensor_parallel": [
                {"degree": entry.degree, "legal": entry.legal, "obstacle": entry.obstacle}
                for entry in self.tensor_parallel
            ],
            "quantizable": [{**asdict(group), "parameters": group.parameters} for group in self.quantizable],
            "predicted_sizes": [asdict(size) for size in self.predicted_sizes],
        }


def inspect_model(source: ModelSource, plans: Mapping[str, Plan], context: int | None = None) -> Inspection:
    """Describe a model at `context` tokens (default: 2048, or what the model reads if that is less).

    Sizes are predicted for each of `plans`, by the name of the scheme that was asked for.

    Raises:
        UsageError: the context is not one that the model has.
        UnsupportedError: the config names a dtype of unknown size.
    """
    spec = source.spec
    tokens = min(DEFAULT_CONTEXT, spec.context_length) if context is None else context
    if not 1 <= tokens <= spec.context_length:
        what = f"a context of {tokens} tokens, where the model reads 1 to {spec.context_length}"
        raise UsageError(what, where="--context")
    return Inspection(
        name=source.name,
        revision=source.revision,
        spec=spec,
        context=tokens,
        parts=cost.parts(spec),
        prefill=cost.prefill(spec, tokens),
        decode=cost.decode(spec, tokens),
        kv_bytes_per_token=cost.kv_bytes_per_token(spec),
        kv_bytes_at_context=cost.kv_bytes_at(spec, tokens),
        tensor_parallel=parallel.tensor_parallel_degrees(spec),
        quantizable=storage.quantizable(spec),
        predicted_sizes=tuple(_predicted(spec, scheme, plan) for scheme, plan in plans.items()),
        stored_bytes=_stored_bytes(source),
    )


def _stored_bytes(source: ModelSource) -> dict[str, int] | None:
    if source.gguf is None:
        return None
    from llmopt.model.gguf_file import bytes_by_type  # noqa: PLC0415 (needs gguf, which other models do not)

    return bytes_by_type(source.gguf)


def _predicted(spec: ModelSpec, scheme: str, plan: Plan) -> PredictedSize:
    tables = plan[spec.head.name]
    return PredictedSize(
        scheme=scheme, tables=tables.name if tables else "float32", size_bytes=storage.quantized_bytes(spec, plan)
    )


def _identity(spec: ModelSpec) -> dict[str, Any]:
    attention = spec.blocks[0].attention
    return {
        "family": spec.family,
        "architecture": spec.architecture,
        "genai_type": spec.genai_type,
        "dtype": spec.dtype,
        "blocks": len(spec.blocks),
        "hidden_size": spec.hidden_size,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "mlp_size": spec.blocks[0].mlp.size,
        "vocab_size": spec.vocab_size,
        "tied": spec.tied,
        "context_length": spec.context_length,
        "longest_sequence": longest_sequence(spec),
    }


def _work(work: cost.Work) -> dict[str, Any]:
    per_token = {"flops_per_token": work.flops_per_token, "bytes_per_token": work.bytes_per_token}
    return {**asdict(work), **per_token}
