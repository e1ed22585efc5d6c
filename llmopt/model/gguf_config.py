"""From GGUF metadata to the Hugging Face config that the file was made from, as far as the file remembers it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmopt.errors import ModelError, UnsupportedError
from llmopt.model.gguf_header import GgufHeader
from llmopt.model.rotary import frequencies
from llmopt.model.spec import Rotary

FloatVector = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
ReadVector = Callable[[str], FloatVector]
Config = dict[str, Any]

# GGUF keys, behind the architecture's name, by the config keys that they stand for.
_COMMON = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_SAME_NAME = ("gpt2", "llama", "phi3", "qwen2", "qwen3")
_MODEL_TYPES = {name: name for name in _SAME_NAME} | {"gemma3": "gemma3_text"}

# What the files of the only Llama models with scaled rotary have in common (Llama 3.1 to 3.3); the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA3_27B_BLOCKS = 62


def architecture(header: GgufHeader, *, where: str) -> str:
    """The architecture that the file declares.

    Raises:
        ModelError: it declares none.
        UnsupportedError: it is not known here.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError("the file does not say which architecture it holds", where=where, hint="is this a model?")
    if name not in _MODEL_TYPES:
        raise UnsupportedError(
            f"GGUF architecture {name!r} is not supported", where=where, hint=f"known: {', '.join(_MODEL_TYPES)}"
        )
    return name


def config_from_gguf(header: GgufHeader, read_vector: ReadVector, *, where: str) -> Config:
    """A config that the family of the architecture understands. `read_vector` gives one of the file's small tensors.

    Raises:
        ModelError: the metadata lacks a key.
        UnsupportedError: the architecture, or the way it scales its rotary embedding, is not known here.
    """
    arch = architecture(header, where=where)
    keys = _Keys(header, arch, where)
    config: Config = {"model_type": _MODEL_TYPES[arch], "dtype": "float32"}
    config |= {key: header.metadata[gguf] for key, gguf in _TOKENS.items() if gguf in header.metadata}
    if "token_embd.weight" not in header.tensors:
        raise ModelError("the file lacks token_embd.weight", where=where, hint="is this a language model?")
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if keys.need("block_count") > len(header.tensors):  # a damaged number would keep us building blocks for hours
        raise ModelError(f"{keys.need('block_count')} blocks in {len(header.tensors)} tensors", where=where)
    if arch == "gpt2":
        return config | {key: keys.need(gguf) for key, gguf in _GPT2.items()}
    config |= {key: keys.need(gguf) for key, gguf in _COMMON.items()}
    config["num_key_value_heads"] = keys.get("attention.head_count_kv", config["num_attention_heads"])
    config["head_dim"] = keys.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    config |= _attention(arch, config, keys)
    return config | _rope(arch, config, keys, read_vector)


class _Keys:
    """The metadata of one architecture."""

    def __init__(self, header: GgufHeader, arch: str, where: str) -> None:
        self.tensors = header.tensors
        self._metadata, self._arch, self.where = header.metadata, arch, where

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._arch}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ModelError(f"the metadata lacks {self._arch}.{key}", where=self.where, hint="convert the model again")
        return value


def _attention(arch: str, config: Mapping[str, Any], keys: _Keys) -> Config:
    if arch == "phi3":
        return {"sliding_window": keys.get("attention.sliding_window")}
    if arch != "gemma3":
        return {}
    # The file does not hold this number. As in llama.cpp: only the 27B model scales by the width of a head on average.
    large = config["num_hidden_layers"] == _GEMMA3_27B_BLOCKS
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    local_theta = keys.get("rope.freq_base_swa", 1e4)
    window = keys.need("attention.sliding_window")
    return {"query_pre_attn_scalar": scalar, "sliding_window": window, "rope_local_base_freq": local_theta}


def _rope(arch: str, config: Mapping[str, Any], keys: _Keys, read_vector: ReadVector) -> Config:
    rotated = keys.get("rope.dimension_count", config["head_dim"])
    rope: Config = {"rope_theta": keys.get("rope.freq_base", 1e6 if arch == "gemma3" else 1e4)}
    if rotated != config["head_dim"]:
        rope["partial_rotary_factor"] = rotated / config["head_dim"]
    original = keys.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in keys.tensors:
        rotary = Rotary(dim=rotated, theta=rope["rope_theta"])
        return rope | {"rope_scaling": _llama3(rotary, read_vector("rope_freqs.weight"), keys.where)}
    if "rope_factors_long.weight" in keys.tensors:
        names = {f"{length}_factor": f"rope_factors_{length}.weight" for length in ("long", "short")}
        longrope = {"rope_type": "longrope", **{key: read_vector(name).tolist() for key, name in names.items()}}
        return rope | {"rope_scaling": longrope, "original_max_position_embeddings": original}
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor")
    if kind == "none" or not factor:
        return rope
    scaling = {"rope_type": kind, "factor": factor}
    return rope | {"rope_scaling": scaling | ({"original_max_position_embeddings": original} if original else {})}


def _llama3(rotary: Rotary, slowed_by: FloatVector, where: str) -> Config:
    """The config behind a table of "so many times slower", one for each pair of channels.

    Raises:
        UnsupportedError: no known config gives this table.
    """
    scaling = {"rope_type": "llama3", "factor": float(slowed_by.max()), **_LLAMA3}
    scaled = Rotary(dim=rotary.dim, theta=rotary.theta, scaling=tuple(sorted(scaling.items())))
    if not np.allclose(frequencies(rotary) / frequencies(scaled), slowed_by, rtol=1e-4):
        hint = "use the model's Hugging Face folder"
        raise UnsupportedError("its rotary frequencies follow no rule that is known here", where=where, hint=hint)
    return scaling
