"""What a model is, without its weights: the one description that every room works from.

Quantization asks it which linears exist and which norm feeds them, export builds the graph from it, partition takes
costs and legal tensor-parallel degrees from it, and the checkpoint is checked against it. A family of models is one
function from a Hugging Face config to a `ModelSpec`; nothing else learns the family's name.

Names are those of the checkpoint. Shapes are those of `torch.nn`: a linear's weight is [out_features, in_features],
unless `transposed` says that the checkpoint stores [in_features, out_features].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that the checkpoint must hold: its name and its shape as stored."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix product, y = x Wᵀ + b. `tied_to` names the embedding whose table serves as its weight."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    transposed: bool = False
    tied_to: str | None = None

    @property
    def weight(self) -> TensorSpec:
        """The weight as the checkpoint stores it."""
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return TensorSpec(f"{self.tied_to or self.name}.weight", shape)

    def tensors(self) -> Iterator[TensorSpec]:
        """What the checkpoint holds for this linear; nothing for the weight of a tied one."""
        if self.tied_to is None:
            yield self.weight
        if self.bias:
            yield TensorSpec(f"{self.name}.bias", (self.out_features,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS norm or layer norm over the last axis. Gemma stores its weight minus one: `offset` is then 1."""

    name: str
    size: int
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    bias: bool = False

    def tensors(self) -> Iterator[TensorSpec]:
        """The weight, and the bias where there is one."""
        yield TensorSpec(f"{self.name}.weight", (self.size,))
        if self.bias:
            yield TensorSpec(f"{self.name}.bias", (self.size,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary position embedding on the first `dim` channels of each head; first half paired with second half.

    `scaling` is the config's own description (sorted pairs, so that the spec stays hashable); `rotary.py` reads it.
    """

    dim: int
    theta: float
    scaling: tuple[tuple[str, object], ...] = ()

    @property
    def kind(self) -> str:
        """`default`, `linear`, `llama3`, `yarn`, …: the config's word."""
        return str(dict(self.scaling).get("rope_type", "default"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention. `inputs` is (q, k, v), or one linear whose rows are q, then k, then v.

    `window` is the number of tokens that a query sees, itself included; None sees all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    inputs: tuple[Linear, ...]
    output: Linear
    rotary: Rotary | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None

    @property
    def q_size(self) -> int:
        """Channels of the queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of the keys (or of the values), all heads together."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """down(act(gate x) * up x) when `gated`, else down(act(up x)).

    `inputs` is (gate, up), or one linear whose rows are gate then up, or, when not gated, (up,).
    """

    inputs: tuple[Linear, ...]
    down: Linear
    activation: Activation
    gated: bool = True

    @property
    def size(self) -> int:
        """Channels between the two products."""
        return self.down.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Pre-norm attention and MLP with residuals; Gemma norms each branch's output as well, before it is added."""

    index: int
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None

    def linears(self) -> Iterator[Linear]:
        """In the order of computation."""
        yield from self.attention.inputs
        yield self.attention.output
        yield from self.mlp.inputs
        yield self.mlp.down

    def norms(self) -> Iterator[Norm]:
        """In the order of computation."""
        norms = (
            self.attention_norm,
            self.attention.q_norm,
            self.attention.k_norm,
            self.attention_post_norm,
            self.mlp_norm,
            self.mlp_post_norm,
        )
        yield from (norm for norm in norms if norm is not None)

    def tensors(self) -> Iterator[TensorSpec]:
        """What the checkpoint holds for this block."""
        for norm in self.norms():
            yield from norm.tensors()
        for linear in self.linears():
            yield from linear.tensors()


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Learned absolute positions: row `position + offset` of a [rows, width] table is added to the embedding."""

    name: str
    rows: int
    width: int
    offset: int = 0

    def tensors(self) -> Iterator[TensorSpec]:
        """The table."""
        yield TensorSpec(f"{self.name}.weight", (self.rows, self.width))


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token embedding, [vocab_size, width], times `scale` (Gemma: the root of the width)."""

    name: str
    vocab_size: int
    width: int
    scale: float = 1.0
    positions: Positions | None = None

    def tensors(self) -> Iterator[TensorSpec]:
        """The table, and that of the positions where they are learned."""
        yield TensorSpec(f"{self.name}.weight", (self.vocab_size, self.width))
        if self.positions is not None:
            yield from self.positions.tensors()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model. `base_prefix` may be missing from a checkpoint's names (older exports)."""

    family: str
    architecture: str
    hidden_size: int
    context_length: int
    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: Linear
    dtype: str  # the dtype that the config names, such as "bfloat16"
    base_prefix: str = "model."
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    genai_type: str | None = None  # what onnxruntime-genai calls this family; None: it does not know it
    before_head: Linear | None = None  # a float product between the final norm and the head, of a turned model

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return self.embedding.vocab_size

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's table."""
        return self.head.tied_to is not None

    def linears(self) -> Iterator[Linear]:
        """Every linear, the head last."""
        for block in self.blocks:
            yield from block.linears()
        yield self.head

    def tensors_before_head(self) -> Iterator[TensorSpec]:
        """What stands between the last block and the head."""
        yield from self.final_norm.tensors()
        if self.before_head is not None:
            yield from self.before_head.tensors()

    def tensors(self) -> Iterator[TensorSpec]:
        """Everything that the checkpoint must hold, in the order in which the model uses it."""
        yield from self.embedding.tensors()
        for block in self.blocks:
            yield from block.tensors()
        yield from self.tensors_before_head()
        yield from self.head.tensors()
