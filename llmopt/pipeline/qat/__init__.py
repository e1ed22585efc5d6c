"""Quantization-aware training: a quantized model learns to be what the float model is."""
