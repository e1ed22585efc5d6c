"""Quantization: what a scheme is, how scales and codes are found, how they are packed; one file a method."""
