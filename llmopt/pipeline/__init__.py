"""The main jobs, each from typed request to typed result: quantize a model, bench artifacts, run a recipe."""
