"""What llama.cpp's converter does to tensors on their way into a GGUF file, undone."""

from typing import Any

import numpy as np

from llmopt.model.families import Config

Array = np.ndarray[Any, Any]


def unpermute_rotary(name: str, tensor: Array, config: Config) -> Array:
    """Rows of q and k back to the order in which a head's first half is rotated with its second half.

    For Llama the converter interleaves the halves, since ggml's kernel rotates neighbours: it views the rows as
    [heads, 2, head_dim / 2] and swaps the last two. `tensor` is a weight [rows, columns] or a bias [rows].
    """
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return tensor
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
