"""Where the new tokens stand in their sequences: read off the attention mask, which is all that engines give."""

import numpy as np
from onnx import TensorProto

from llmopt.export.onnx.graph import Graph


class Positions:
    """Names of values that say how long the sequences are: the last position of each row (int32 [batch]) and the
    length of the longest (a scalar, int64 and int32). `tokens` is a value [batch, tokens, …] of the new ones.
    """

    def __init__(self, graph: Graph, tokens: str) -> None:
        self.graph = graph
        self._tokens = tokens
        self._first: str | None = None
        # GroupQueryAttention wants both as int32.
        ones = graph.node(
            "ReduceSum", ["attention_mask", graph.constant(np.array([1], np.int64))], "mask/sum", keepdims=0
        )
        self.last = graph.node("Sub", [ones, graph.constant(np.int64(1))], "mask/last")
        self.last_int32 = graph.node("Cast", [self.last], "mask/last_int32", to=TensorProto.INT32)
        shape = graph.node("Shape", ["attention_mask"], "mask/shape")
        self.length = graph.node("Gather", [shape, graph.constant(np.int64(1))], "mask/length", axis=0)
        self.length_int32 = graph.node("Cast", [self.length], "mask/length_int32", to=TensorProto.INT32)

    def first(self) -> str:
        """The position of the first new token, int64 [1]: the new ones are the last under the mask."""
        if self._first is None:
            graph = self.graph
            shape = graph.node("Shape", [self._tokens], "positions/shape")
            count = graph.node("Gather", [shape, graph.constant(np.array([1], np.int64))], "positions/count", axis=0)
            self._first = graph.node("Sub", [self.length, count], "positions/first")
        return self._first

    def of_logits(self, asked: str) -> str:
        """Indices for GatherND, int64 [batch, logits, 1]: those asked for, or of each row the last that is no padding.

        `asked` is int64 [logits], the same for all rows; -1 stands for the last.
        """
        graph, axis = self.graph, self.graph.constant(np.array([-1], np.int64))
        ours = graph.node("Sub", [self.last, self.first()], "logits/last_in_mask")
        # In decoding, rows shorter than others have their new token behind a gap in the mask.
        ours = graph.node("Max", [ours, graph.constant(np.int64(0))], "logits/last")
        ours = graph.node("Unsqueeze", [ours, axis], "logits/last_column")
        default = graph.node("Less", [asked, graph.constant(np.int64(0))], "logits/default")
        indices = graph.node("Where", [default, ours, asked], "logits/indices")
        return graph.node("Unsqueeze", [indices, axis], "logits/at")

    def rows(self, offset: int) -> str:
        """For each new token its position plus an offset: its row in a table of learned positions."""
        graph, shift = self.graph, self.graph.constant(np.int64(offset))
        start = graph.node("Squeeze", [self.first()], "positions/first_scalar")
        start = graph.node("Add", [start, shift], "positions/start")
        stop = graph.node("Add", [self.length, shift], "positions/stop")
        return graph.node("Range", [start, stop, graph.constant(np.int64(1))], "positions/range")
