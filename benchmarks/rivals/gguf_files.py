"""The reference model as GGUF files, quantized by llama.cpp.

PYTHON benchmarks/rivals/gguf_files.py FOLDER ORIGINAL.gguf OUTPUT

PYTHON is that of an environment with llama-cpp-python, gguf and safetensors. Metadata and tokenizer are those of the
file that the reference model was made from, weights those of FOLDER; OUTPUT gets q8_0.gguf, q4_0.gguf, q4_k_m.gguf.
"""

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

# llama.h, enum llama_ftype
KINDS = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
Array = np.ndarray[Any, np.dtype[Any]]


def original_name(name: str) -> str:
    """The name of a GGUF tensor in a Hugging Face checkpoint of the Llama family."""
    if name in WHOLE:
        return WHOLE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    assert match is not None, name
    return f"model.layers.{match[1]}.{PARTS[match[2]]}.weight"


def interleaved(weight_OI: Array, heads: int) -> Array:
    """Rows of each head so that the two of a rotary pair, half a head apart in Hugging Face's order, are neighbours."""
    halves = weight_OI.reshape(heads, 2, -1, weight_OI.shape[1])
    return halves.transpose(0, 2, 1, 3).reshape(weight_OI.shape)


def write_half(folder: Path, original: Path, output: Path) -> None:
    """The weights as a GGUF file in float16, norms in float32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights, reader, writer = load_file(folder / "model.safetensors"), GGUFReader(original), GGUFWriter(output, "llama")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    written_anew = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in written_anew:
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    writer.add_file_type(1)
    for tensor in reader.tensors:
        value = weights[original_name(tensor.name)]
        part = tensor.name.split(".")[-2]
        if part in heads:
            value = interleaved(value, heads[part])
        writer.add_tensor(tensor.name, value.astype(np.float16 if value.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    import llama_cpp

    folder, original, output = map(Path, sys.argv[1:])
    half = output / "f16.gguf"
    write_half(folder, original, half)
    for name, kind in KINDS.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = kind
        written = str(output / f"{name}.gguf").encode()
        assert llama_cpp.llama_model_quantize(str(half).encode(), written, ctypes.byref(settings)) == 0
    half.unlink()


if __name__ == "__main__":
    main()
