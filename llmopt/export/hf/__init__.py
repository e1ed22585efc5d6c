"""compressed-tensors: safetensors and a config that transformers and vLLM open."""
