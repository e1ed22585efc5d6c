"""A graph of one product with a random weight, to time a kernel with."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from llmopt.export.onnx.graph import IR_VERSION, MICROSOFT, OPSET
from llmopt.export.onnx.kernels import Kernel, Shape


def one_product(shape: Shape, kernel: Kernel) -> bytes:
    """A graph that multiplies x, float32 [tokens, columns], by a random weight."""
    rng = np.random.default_rng(0)
    bits, blocks = shape.scheme.bits, -(-shape.columns // kernel.block_size)
    tensors = {
        "codes": rng.integers(0, 256, (shape.rows, blocks, kernel.block_size * bits // 8), np.uint8),
        "scales": rng.random((shape.rows, blocks), np.float32),
    }
    if not shape.scheme.symmetric:
        tensors["zero_points"] = rng.integers(0, 256, (shape.rows, -(-blocks * bits // 8)), np.uint8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain=MICROSOFT,
        K=shape.columns,
        N=shape.rows,
        bits=bits,
        block_size=kernel.block_size,
        accuracy_level=kernel.accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", shape.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", shape.rows])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return content
