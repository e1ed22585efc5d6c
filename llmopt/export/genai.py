"""`genai_config.json`: what onnxruntime-genai needs to know besides the graph."""

from collections.abc import Mapping
from typing import Any

from llmopt.model.rotary import longest_sequence
from llmopt.model.spec import ModelSpec

# What a model's generation_config.json may say about sampling, and genai's own defaults.
_SEARCH = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "do_sample": False}


def genai_config(spec: ModelSpec, generation: Mapping[str, Any], graph_file: str) -> dict[str, Any] | None:
    """The config as an object, or None for a family that onnxruntime-genai does not know."""
    if spec.genai_type is None:
        return None
    attention = spec.blocks[0].attention
    length = longest_sequence(spec)
    stops = stop_tokens(spec, generation)
    decoder = {
        "filename": graph_file,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": attention.head_dim,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": attention.heads,
        "num_hidden_layers": len(spec.blocks),
        "num_key_value_heads": attention.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": spec.genai_type,
        "vocab_size": spec.vocab_size,
        "context_length": length,
        "bos_token_id": spec.bos_token_id if spec.bos_token_id is not None else 0,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": spec.pad_token_id if spec.pad_token_id is not None else (stops or [0])[0],
        "decoder": decoder,
    }
    search = {name: generation.get(name, default) for name, default in _SEARCH.items()}
    search |= {"max_length": length, "min_length": 0, "num_beams": 1, "num_return_sequences": 1}
    # Past and present in one buffer: without it the whole cache is copied for every token.
    return {"model": model, "search": search | {"past_present_share_buffer": True}}


def stop_tokens(spec: ModelSpec, generation: Mapping[str, Any]) -> list[int]:
    """Tokens that end a text: those of generation_config.json, where chat models name the ends of turns, or the spec's.

    Those beyond the vocabulary are left out: no model says them, and onnxruntime-genai refuses to open.
    """
    named = generation.get("eos_token_id")
    if named is None:
        named = spec.eos_token_ids
    tokens = [named] if isinstance(named, int) else named
    return [token for token in tokens if 0 <= token < spec.vocab_size]
