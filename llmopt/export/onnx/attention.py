"""Attention as nodes: one GroupQueryAttention a block, with packed inputs and the rotation inside where it can be."""

import numpy as np
from onnx import TensorProto

from llmopt.errors import UnsupportedError
from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.linear import emit, emit_together
from llmopt.export.onnx.norm import emit_norm
from llmopt.export.onnx.positions import Positions
from llmopt.export.onnx.together import queries_keys_values
from llmopt.export.onnx.weights import Weights, product
from llmopt.model.rotary import supported_length, tables
from llmopt.model.spec import Attention, ModelSpec, Norm, Rotary

# What GroupQueryAttention takes on the CPU, and what more it takes if it is to rotate.
HEAD_MULTIPLE = 8
ROTATED_HEAD_MULTIPLE = 16
PAIRS_MULTIPLE = 8


class AttentionWriter:
    """Writes the attention of block after block; they share positions and rotary tables."""

    def __init__(self, graph: Graph, spec: ModelSpec, positions: Positions) -> None:
        self.graph = graph
        self.context_length = spec.context_length
        self.positions = positions
        self.rotary_tables: dict[tuple[Rotary, bool], tuple[str, str]] = {}  # by whether they are float16, too

    def emit(self, index: int, attention: Attention, x: str, weights: Weights) -> str:
        """Attention and its output product, over the cache of block `index`."""
        scope = attention.output.name.rpartition(".")[0]
        inside = attention.rotary is not None and rotates_inside(attention, attention.rotary)
        queries = self._queries(attention, scope, x, weights, inside=inside)
        half = queries[0] in self.graph.half
        y = self.graph.node(
            "GroupQueryAttention",
            [
                *queries,
                *self._past(index, attention, half=half),
                self.positions.last_int32,
                self.positions.length_int32,
                *(self._tables(attention.rotary, half=half) if attention.rotary is not None and inside else ()),
            ],
            f"{scope}.attention",
            outputs=[f"{scope}.attention/output", f"present.{index}.key", f"present.{index}.value"],
            domain=MICROSOFT,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            do_rotary=int(inside),
            rotary_interleaved=0,
            **({} if attention.window is None else {"local_window_size": attention.window}),
        )
        return emit(self.graph, y, product(attention.output, weights))

    def _past(self, index: int, attention: Attention, *, half: bool) -> list[str]:
        """The cache of a block, in the dtype that its attention computes in."""
        kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        shape: list[int | str] = ["batch_size", attention.kv_heads, "past_sequence_length", attention.head_dim]
        return [self.graph.input(f"past_key_values.{index}.{each}", kind, shape) for each in ("key", "value")]

    def _queries(self, attention: Attention, scope: str, x: str, weights: Weights, *, inside: bool) -> list[str]:
        """The first three inputs: queries, keys and values in one, or each by itself where something is done to them.

        onnxruntime norms inside the kernel on GPUs only.
        """
        products = [product(linear, weights) for linear in attention.inputs]
        packed = emit_together(self.graph, x, queries_keys_values(attention), products)
        outside = attention.rotary if not inside else None
        if outside is None and attention.q_norm is None and attention.k_norm is None:
            return [packed, "", ""]
        sizes = self.graph.constant(np.array([attention.q_size, attention.kv_size, attention.kv_size], np.int64))
        parts = [f"{scope}.split/{part}" for part in ("q", "k", "v")]
        self.graph.node("Split", [packed, sizes], f"{scope}.split", outputs=parts, axis=-1)
        for place, norm, heads in ((0, attention.q_norm, attention.heads), (1, attention.k_norm, attention.kv_heads)):
            if norm is not None:
                parts[place] = self._norm_heads(norm, parts[place], weights)
            if outside is not None:
                parts[place] = self._rotate(outside, parts[place], heads, attention.head_dim)
        return parts

    def _norm_heads(self, norm: Norm, x: str, weights: Weights) -> str:
        graph = self.graph
        apart = graph.constant(np.array([0, 0, -1, norm.size], np.int64))
        normed = emit_norm(graph, graph.node("Reshape", [x, apart], f"{norm.name}/heads"), norm, weights)
        return graph.node("Reshape", [normed, graph.constant(np.array([0, 0, -1], np.int64))], f"{norm.name}/joined")

    def _rotate(self, rotary: Rotary, x: str, heads: int, head_dim: int) -> str:
        """The rotation as a node of its own, for heads that the one inside the attention kernel does not take."""
        return self.graph.node(
            "RotaryEmbedding",
            [x, self.positions.first(), *self._tables(rotary, half=x in self.graph.half)],
            f"{x}/rotated",
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=0 if rotary.dim == head_dim else rotary.dim,
            interleaved=0,
        )

    def _tables(self, rotary: Rotary, *, half: bool) -> tuple[str, str]:
        """Tables of cosines and sines, written once for all blocks that share them."""
        key = (rotary, half)
        if key not in self.rotary_tables:
            found = tables(rotary, supported_length(rotary, self.context_length), self.context_length)
            cos_TR, sin_TR = (table.astype(np.float16) for table in found) if half else found
            prefix = f"rotary.{len(self.rotary_tables)}"
            names = (self.graph.tensor(f"{prefix}.cos", cos_TR), self.graph.tensor(f"{prefix}.sin", sin_TR))
            self.rotary_tables[key] = names
        return self.rotary_tables[key]


def rotates_inside(attention: Attention, rotary: Rotary) -> bool:
    """Whether GroupQueryAttention can do the rotation."""
    return attention.head_dim % ROTATED_HEAD_MULTIPLE == 0 and rotary.dim // 2 % PAIRS_MULTIPLE == 0


def require_heads(spec: ModelSpec) -> None:
    """See that there is a kernel for the model's attention.

    Raises:
        UnsupportedError: its heads have a size that onnxruntime does not take.
    """
    for head_dim in sorted({block.attention.head_dim for block in spec.blocks}):
        if head_dim % HEAD_MULTIPLE:
            raise UnsupportedError(
                f"attention heads of {head_dim} channels, where onnxruntime takes multiples of {HEAD_MULTIPLE}",
                hint="use a model whose head_dim is one",
            )
