"""The decoder as a graph, built from its `ModelSpec`: embedding, blocks in order, head.

Each part is written as its weights come, so one block is in memory at a time. Weights are given under the names of
the checkpoint, float tensors or `QuantizedWeight`s. Activations are float32.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from torch import Tensor

from llmopt.export.onnx.embedding import TiedTable, emit_embedding, emit_tied_head
from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.linear import Product, emit, emit_together
from llmopt.model.rotary import supported_length, tables
from llmopt.model.spec import Attention, Block, Linear, Mlp, ModelSpec, Norm, Rotary
from llmopt.quantize.weights import QuantizedWeight

Weights = Mapping[str, Tensor | QuantizedWeight]


class DecoderGraph:
    """Call `embedding`, then `block` for each block, then `head`, then `save`."""

    def __init__(self, folder: Path, spec: ModelSpec, *, signed_int8: bool = False) -> None:
        self.spec = spec
        self.graph = Graph(folder, signed_int8=signed_int8)
        self.residual = ""  # the sum so far
        self.branch: str | None = None  # what is to be added to it by the next norm
        self.tied_table: TiedTable | None = None
        self.rotary_tables: dict[Rotary, tuple[str, str]] = {}
        self._declare_inputs()

    def _declare_inputs(self) -> None:
        graph, attention = self.graph, self.spec.blocks[0].attention
        graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        cache = (attention.kv_heads, attention.head_dim)
        for index in range(len(self.spec.blocks)):
            for kind in ("key", "value"):
                past: list[int | str] = ["batch_size", cache[0], "past_sequence_length", cache[1]]
                graph.input(f"past_key_values.{index}.{kind}", TensorProto.FLOAT, past)
        # GroupQueryAttention wants the last position of each row and the length of the longest, both as int32.
        ones = graph.node(
            "ReduceSum", ["attention_mask", graph.constant(np.array([1], np.int64))], "mask/sum", keepdims=0
        )
        last = graph.node("Sub", [ones, graph.constant(np.int64(1))], "mask/last")
        self.last_positions = graph.node("Cast", [last], "mask/last_int32", to=TensorProto.INT32)
        shape = graph.node("Shape", ["attention_mask"], "mask/shape")
        self.total_length = graph.node("Gather", [shape, graph.constant(np.int64(1))], "mask/length", axis=0)
        self.total_length_int32 = graph.node("Cast", [self.total_length], "mask/length_int32", to=TensorProto.INT32)

    def embedding(self, weights: Weights) -> None:
        """Token embedding, its scale, and learned positions."""
        graph, embedding = self.graph, self.spec.embedding
        self.residual, self.tied_table = emit_embedding(
            graph, embedding, weights[f"{embedding.name}.weight"], self.spec.tied
        )
        if embedding.scale != 1:
            factor = graph.constant(np.float32(embedding.scale))
            self.residual = graph.node("Mul", [self.residual, factor], "embedding/scale")
        if embedding.positions is not None:
            table = as_float(weights[f"{embedding.positions.name}.weight"])
            rows = graph.tensor(f"{embedding.positions.name}.weight", table)
            where = self._positions(embedding.positions.offset)
            position = graph.node("Gather", [rows, where], "embedding/positions", axis=0)
            self.residual = graph.node("Add", [self.residual, position], "embedding/sum")

    def _positions(self, offset: int) -> str:
        """Rows of the position table for the new tokens: they are the last ones under the mask."""
        graph = self.graph
        shape = graph.node("Shape", ["input_ids"], "positions/shape")
        count = graph.node("Gather", [shape, graph.constant(np.int64(1))], "positions/count", axis=0)
        shift = graph.constant(np.int64(offset))
        stop = graph.node("Add", [self.total_length, shift], "positions/stop")
        start = graph.node("Sub", [stop, count], "positions/start")
        return graph.node("Range", [start, stop, graph.constant(np.int64(1))], "positions/range")

    def block(self, block: Block, weights: Weights) -> None:
        """One block: attention and MLP, each normed before and added after."""
        x = self._add_and_norm(block.attention_norm, weights)
        y = self._attention(block.index, block.attention, x, weights)
        self.branch = self._post_norm(block.attention_post_norm, y, weights)
        x = self._add_and_norm(block.mlp_norm, weights)
        self.branch = self._post_norm(block.mlp_post_norm, self._mlp(block.mlp, x, weights), weights)

    def _post_norm(self, norm: Norm | None, y: str, weights: Weights) -> str:
        return y if norm is None else self._norm(norm, y, weights)

    def _norm_inputs(self, norm: Norm, weights: Weights) -> list[str]:
        scale = as_float(weights[f"{norm.name}.weight"]) + np.float32(norm.offset)
        inputs = [self.graph.tensor(f"{norm.name}.weight", scale)]
        if norm.bias:
            inputs.append(self.graph.tensor(f"{norm.name}.bias", as_float(weights[f"{norm.name}.bias"])))
        return inputs

    def _norm(self, norm: Norm, x: str, weights: Weights) -> str:
        op = "SimplifiedLayerNormalization" if norm.kind == "rms" else "LayerNormalization"
        return self.graph.node(op, [x, *self._norm_inputs(norm, weights)], norm.name, axis=-1, epsilon=norm.eps)

    def _add_and_norm(self, norm: Norm, weights: Weights) -> str:
        """Add the last branch to the residual and norm the sum, in one node."""
        if self.branch is None:
            return self._norm(norm, self.residual, weights)
        op = "SkipSimplifiedLayerNormalization" if norm.kind == "rms" else "SkipLayerNormalization"
        outputs = [f"{norm.name}/output", "", "", f"{norm.name}/sum"]
        inputs = [self.residual, self.branch, *self._norm_inputs(norm, weights)]
        normed = self.graph.node(op, inputs, norm.name, outputs=outputs, domain=MICROSOFT, epsilon=norm.eps)
        self.residual, self.branch = outputs[3], None
        return normed

    def _attention(self, index: int, attention: Attention, x: str, weights: Weights) -> str:
        graph, scope = self.graph, attention.output.name.rpartition(".")[0]
        products = [product(linear, weights) for linear in attention.inputs]
        if attention.q_norm is None or attention.k_norm is None:
            queries = [emit_together(graph, x, f"{scope}.qkv_proj", products), "", ""]
        else:
            queries = self._normed_queries(attention, x, products, weights)
        rotary = self._rotary(attention.rotary) if attention.rotary is not None else ()
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        attributes = {} if attention.window is None else {"local_window_size": attention.window}
        y = graph.node(
            "GroupQueryAttention",
            [*queries, *past, self.last_positions, self.total_length_int32, *rotary],
            f"{scope}.attention",
            outputs=[f"{scope}.attention/output", *present],
            domain=MICROSOFT,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            do_rotary=int(attention.rotary is not None),
            rotary_interleaved=0,
            **attributes,
        )
        return emit(graph, y, product(attention.output, weights))

    def _normed_queries(self, attention: Attention, x: str, products: Sequence[Product], weights: Weights) -> list[str]:
        """Queries and keys normed head by head, and values; onnxruntime fuses this on GPUs only."""
        graph = self.graph
        heads = zip(products, (attention.q_norm, attention.k_norm, None), strict=True)
        outputs = []
        for item, norm in heads:
            y = emit(graph, x, item)
            if norm is not None:
                split = graph.constant(np.array([0, 0, -1, attention.head_dim], np.int64))
                y = self._norm(norm, graph.node("Reshape", [y, split], f"{item.name}/heads"), weights)
                y = graph.node("Reshape", [y, graph.constant(np.array([0, 0, -1], np.int64))], f"{item.name}/joined")
            outputs.append(y)
        return outputs

    def _rotary(self, rotary: Rotary) -> tuple[str, str]:
        """Tables of cosines and sines, written once for all blocks that share them."""
        if rotary not in self.rotary_tables:
            length = supported_length(rotary, self.spec.context_length)
            pair = tables(rotary, length, self.spec.context_length)
            prefix = f"rotary.{len(self.rotary_tables)}"
            names = (self.graph.tensor(f"{prefix}.cos", pair[0]), self.graph.tensor(f"{prefix}.sin", pair[1]))
            self.rotary_tables[rotary] = names
        return self.rotary_tables[rotary]

    def _mlp(self, mlp: Mlp, x: str, weights: Weights) -> str:
        graph, scope = self.graph, mlp.down.name.rpartition(".")[0]
        outputs = [emit(graph, x, product(linear, weights)) for linear in mlp.inputs]
        if mlp.gated and len(outputs) == 1:
            halves = [f"{scope}.split/gate", f"{scope}.split/up"]
            graph.node("Split", outputs, f"{scope}.split", outputs=halves, axis=-1, num_outputs=2)
            outputs = halves
        y = self._activate(mlp, outputs[0], scope)
        if mlp.gated:
            y = graph.node("Mul", [y, outputs[1]], f"{scope}.gated")
        return emit(graph, y, product(mlp.down, weights))

    def _activate(self, mlp: Mlp, x: str, scope: str) -> str:
        name = f"{scope}.activation"
        match mlp.activation:
            case "silu":  # x σ(αx) with α = 1, which standard ONNX takes two nodes for
                return self.graph.node("QuickGelu", [x], name, domain=MICROSOFT, alpha=1.0)
            case "gelu_tanh":
                return self.graph.node("FastGelu", [x], name, domain=MICROSOFT)
            case "gelu":
                return self.graph.node("Gelu", [x], name, domain=MICROSOFT)
            case "relu":
                return self.graph.node("Relu", [x], name)

    def head(self, weights: Weights) -> None:
        """Final norm and logits."""
        x = self._add_and_norm(self.spec.final_norm, weights)
        if self.tied_table is not None:
            logits = emit_tied_head(self.graph, x, self.spec.head, self.tied_table)
        else:
            logits = emit(self.graph, x, product(self.spec.head, weights))
        self.graph.node("Identity", [logits], "logits", outputs=["logits"])

    def save(self, version: str) -> onnx.ModelProto:
        """Write the graph beside its data."""
        attention = self.spec.blocks[0].attention
        shape: list[int | str] = ["batch_size", "sequence_length", self.spec.vocab_size]
        self.graph.output("logits", TensorProto.FLOAT, shape)
        cache: list[int | str] = ["batch_size", attention.kv_heads, "total_sequence_length", attention.head_dim]
        for index in range(len(self.spec.blocks)):
            for kind in ("key", "value"):
                self.graph.output(f"present.{index}.{kind}", TensorProto.FLOAT, cache)
        return self.graph.save(version)


def as_float(tensor: Tensor | QuantizedWeight) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A tensor that no scheme applies to."""
    assert not isinstance(tensor, QuantizedWeight)
    return tensor.numpy()


def product(linear: Linear, weights: Weights) -> Product:
    """A linear with its weight and bias, [out, in] whatever way round the checkpoint keeps it."""
    weight = weights[linear.weight.name]
    bias = weights[f"{linear.name}.bias"] if linear.bias else None
    assert not isinstance(bias, QuantizedWeight)
    return Product(linear.name, weight, bias)
