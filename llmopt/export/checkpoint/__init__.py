"""Checkpoints of quantized weights, as Hugging Face's libraries and vLLM read them: safetensors and a config."""
