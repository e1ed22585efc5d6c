"""The decoder as a graph, built from its `ModelSpec`: embedding, blocks in order, head.

Each part is written as its weights come, so one block is in memory at a time. Weights are given under the names of
the checkpoint, float tensors or `QuantizedWeight`s. A product with a float16 tensor gives float16, all others float32;
what is added or multiplied is float16 if both sides are. Between the two are Casts, and logits are float32.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from llmopt.engine.ort import LOGITS_AT
from llmopt.engine.ort_stages import HIDDEN, IDS, LOGITS, NEXT_HIDDEN
from llmopt.export.onnx.attention import AttentionWriter, require_heads
from llmopt.export.onnx.embedding import emit_embedding, emit_tied_head
from llmopt.export.onnx.graph import MICROSOFT, Graph
from llmopt.export.onnx.kernels import Choose, default_kernel
from llmopt.export.onnx.linear import emit, emit_apart
from llmopt.export.onnx.norm import emit_norm, emit_sum_and_norm
from llmopt.export.onnx.one_token import add_short_ways
from llmopt.export.onnx.positions import Positions
from llmopt.export.onnx.stage import Stage
from llmopt.export.onnx.together import gate_and_up
from llmopt.export.onnx.weights import Weights, as_float, product
from llmopt.model.spec import Block, Mlp, ModelSpec, Norm


class DecoderGraph:
    """Call `embedding`, then `block` for each block, then `head`, then `save`; and `close`, whatever happens.

    Of a stage, `embedding` is for the first alone, and `head` for the last; the others end with `hidden`.

    Raises:
        UnsupportedError: onnxruntime has no kernel for the model's attention.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, choose: Choose = default_kernel, stage: Stage | None = None
    ) -> None:
        require_heads(spec)
        self.spec = spec
        self.stage = stage
        self.blocks: list[int] = []  # those that were written
        self.graph = Graph(folder, choose) if stage is None else stage.graph(folder, choose)
        self.residual = ""  # the sum so far
        self.branch: str | None = None  # what is to be added to it by the next norm
        self.table: tuple[str, ...] = ()  # the embedding's tensors, which a tied head reads too
        tokens = self._declare_inputs()
        self.positions = Positions(self.graph, tokens)
        self.attention = AttentionWriter(self.graph, spec, self.positions)

    def _declare_inputs(self) -> str:
        """Declares them; gives the name of what is computed with."""
        graph, shape = self.graph, ["batch_size", "sequence_length"]
        if self.stage is None or self.stage.first:
            graph.like = graph.input(IDS, TensorProto.INT64, shape)
        else:
            hidden: list[int | str] = [*shape, self.spec.hidden_size]
            self.residual = graph.like = graph.input(HIDDEN, TensorProto.FLOAT, hidden)
        graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        return graph.like

    def embedding(self, weights: Weights) -> None:
        """Token embedding, its scale, and learned positions."""
        graph, embedding = self.graph, self.spec.embedding
        self.residual, self.table = emit_embedding(graph, embedding, weights[f"{embedding.name}.weight"])
        if embedding.scale != 1:
            dtype = np.float16 if self.residual in graph.half else np.float32
            factor = graph.constant(dtype(embedding.scale))
            self.residual = graph.node("Mul", [self.residual, factor], "embedding/scale")
        if embedding.positions is not None:
            table = as_float(weights[f"{embedding.positions.name}.weight"])
            rows = graph.tensor(f"{embedding.positions.name}.weight", table)
            where = self.positions.rows(embedding.positions.offset)
            position = graph.node("Gather", [rows, where], "embedding/positions", axis=0)
            self.residual = graph.node("Add", graph.widest(self.residual, position), "embedding/sum")

    def block(self, block: Block, weights: Weights) -> None:
        """One block: attention and MLP, each normed before and added after."""
        self.blocks.append(block.index)
        x = self._add_and_norm(block.attention_norm, weights)
        y = self.attention.emit(block.index, block.attention, x, weights)
        self.branch = self._post_norm(block.attention_post_norm, y, weights)
        x = self._add_and_norm(block.mlp_norm, weights)
        self.branch = self._post_norm(block.mlp_post_norm, self._mlp(block.mlp, x, weights), weights)

    def _post_norm(self, norm: Norm | None, y: str, weights: Weights) -> str:
        return y if norm is None else emit_norm(self.graph, y, norm, weights)

    def _add_and_norm(self, norm: Norm, weights: Weights) -> str:
        """Add the last branch to the residual, and norm the sum."""
        if self.branch is None:
            return emit_norm(self.graph, self.residual, norm, weights)
        normed, self.residual = emit_sum_and_norm(self.graph, self.residual, self.branch, norm, weights)
        self.branch = None
        return normed

    def _mlp(self, mlp: Mlp, x: str, weights: Weights) -> str:
        graph, scope = self.graph, mlp.down.name.rpartition(".")[0]
        products = [product(linear, weights) for linear in mlp.inputs]
        outputs = emit_apart(graph, x, gate_and_up(mlp), products)
        if mlp.gated and len(outputs) == 1:
            halves = [f"{scope}.split/gate", f"{scope}.split/up"]
            graph.node("Split", outputs, f"{scope}.split", outputs=halves, axis=-1, num_outputs=2)
            outputs = halves
        y = self._activate(mlp, outputs[0], scope)
        if mlp.gated:
            y = graph.node("Mul", graph.widest(y, outputs[1]), f"{scope}.gated")
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
        """Final norm and logits, of those tokens alone that are asked for."""
        graph = self.graph
        x = self._add_and_norm(self.spec.final_norm, weights)
        x = graph.node(
            "GatherND",
            [x, self.positions.of_logits(graph.constant(np.array([-1], np.int64), LOGITS_AT))],
            "logits/hidden",
            batch_dims=1,
        )
        graph.like = x
        if self.spec.before_head is not None:
            x = emit(graph, x, product(self.spec.before_head, weights))
        head = replace(product(self.spec.head, weights), every_token=False)
        # A stage that does not embed has a tied table of its own.
        tied = self.spec.tied and bool(self.table)
        logits = emit_tied_head(graph, x, head, self.table) if tied else emit(graph, x, head)
        graph.node("Identity", [graph.cast(logits, half=False)], LOGITS, outputs=[LOGITS])
        # By the 1 onnxruntime-genai sees that it need not look for the last token.
        graph.output(LOGITS, TensorProto.FLOAT, ["batch_size", 1, self.spec.vocab_size])

    def hidden(self) -> None:
        """The hidden states behind the last block of a stage, for the next one."""
        graph, terms = self.graph, [self.residual, *([] if self.branch is None else [self.branch])]
        wide = [graph.cast(term, half=False) for term in terms]
        graph.node("Add" if len(wide) > 1 else "Identity", wide, "hidden/next", outputs=[NEXT_HIDDEN])
        graph.output(NEXT_HIDDEN, TensorProto.FLOAT, ["batch_size", "sequence_length", self.spec.hidden_size])

    def save(self, version: str) -> onnx.ModelProto:
        """Write the graph beside its data."""
        attention = self.spec.blocks[0].attention
        cache: list[int | str] = ["batch_size", attention.kv_heads, "total_sequence_length", attention.head_dim]
        for index in self.blocks:
            for name in (f"present.{index}.key", f"present.{index}.value"):
                self.graph.output(name, self.graph.kind(name), cache)
        add_short_ways(self.graph)
        if self.stage is not None:
            self.stage.annotate(self.graph.model)
        return self.graph.save(version)

    def close(self) -> None:
        """Close the data file, which an error may have left open."""
        self.graph.data.close()
