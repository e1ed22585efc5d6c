"""An onnxruntime graph, built from the `ModelSpec` and written block by block."""
