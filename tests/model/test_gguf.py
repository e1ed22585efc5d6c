"""A GGUF file is read as the Hugging Face checkpoint that it was made from: same config, same tensors."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from llmopt.cli.app import app
from llmopt.cli.outcome import run
from llmopt.errors import ModelError, UnsupportedError
from llmopt.model.checkpoint import open_checkpoint
from llmopt.model.families import spec_from_config
from llmopt.model.gguf_header import read_header
from llmopt.model.source import ModelSource, open_source
from llmopt.model.spec import ModelSpec

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

BASE: Mapping[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2**-17,
    "rope_theta": 50000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**BASE, "model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {**BASE, "model_type": "qwen2"},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 16},
    "phi3": {**BASE, "model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 16},
    "gemma3": {**BASE, "model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 8},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64,
        "n_positions": 64, "layer_norm_epsilon": 2**-17, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
GGUF_KEYS = {
    "hidden_size": "embedding_length", "n_embd": "embedding_length",
    "num_hidden_layers": "block_count", "n_layer": "block_count",
    "num_attention_heads": "attention.head_count", "n_head": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length", "n_inner": "feed_forward_length",
    "max_position_embeddings": "context_length", "n_positions": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "vocab_size": "vocab_size",
}  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "model.norm": "output_norm", "transformer.ln_f": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "ln_1": "attn_norm", "post_attention_layernorm": "ffn_norm", "ln_2": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "attn.c_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv", "attn.c_attn": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.c_proj": "ffn_down",
}  # fmt: skip
GEMMA_NAMES = {
    **GGUF_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(arch: str, name: str) -> str:
    module, _, part = name.rpartition(".")
    names = GEMMA_NAMES if arch == "gemma3" else GGUF_NAMES
    if ".layers." in module or ".h." in module:
        _, _, index, inner = module.split(".", 3)
        return f"blk.{index}.{names[inner]}.{part}"
    return f"{names[module]}.{part}"


def converted(arch: str, name: str, weight: Array, config: Mapping[str, Any]) -> Array:
    """As `convert_hf_to_gguf.py` of llama.cpp does it."""
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
        return halves.swapaxes(1, 2).reshape(weight.shape)
    if arch == "gemma3" and name.endswith("norm.weight"):
        return weight + 1
    if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.T
    return weight


def random_weights(spec: ModelSpec) -> dict[str, Array]:
    """Sixteenths, so that one can be added and taken away again without rounding."""
    draw = np.random.default_rng(0)
    return {tensor.name: draw.integers(-64, 64, tensor.shape).astype(np.float32) / 16 for tensor in spec.tensors()}


def write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Arrays, kinds: Mapping[str, Kind] = {}) -> Path:
    """A file with F32 tensors, but for those in `kinds`."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = kinds.get(name, Kind.F32)
        data = np.ascontiguousarray(tensor)
        writer.add_tensor(name, data if kind == Kind.F32 else gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(arch: str, **changes: Any) -> dict[str, Any]:
    config = CONFIGS[arch]
    keys = {f"{arch}.{GGUF_KEYS[key]}": value for key, value in config.items() if key in GGUF_KEYS}
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys |= {f"tokenizer.ggml.{name}_token_id": config[key] for key, name in tokens.items()}
    if "head_dim" in config:
        keys[f"{arch}.rope.dimension_count"] = int(config["head_dim"] * config.get("partial_rotary_factor", 1))
    keys["tokenizer.ggml.tokens"] = [f"token {index}" for index in range(config["vocab_size"])]
    return keys | {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}


def gguf_tensors(arch: str) -> dict[str, Array]:
    config = CONFIGS[arch]
    weights = random_weights(spec_from_config(config))
    return {gguf_name(arch, name): converted(arch, name, weight, config) for name, weight in weights.items()}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write(tmp_path / "llama.gguf", "llama", metadata("llama"), gguf_tensors("llama"))


def read_all(source: ModelSource) -> dict[str, torch.Tensor]:
    with open_checkpoint(source) as opened:
        return {tensor.name: opened.read(tensor) for tensor in source.spec.tensors()}


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_file_is_the_checkpoint_that_it_was_made_from(tmp_path: Path, arch: str) -> None:
    path = write(tmp_path / f"{arch}.gguf", arch, metadata(arch), gguf_tensors(arch))
    source, original = open_source(str(path)), spec_from_config(CONFIGS[arch])
    assert source.spec == original
    assert (source.gguf, source.folder, source.weight_files()) == (path, None, (path,))
    weights = random_weights(original)
    for name, tensor in read_all(source).items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, torch.from_numpy(weights[name])), name


@pytest.mark.parametrize("arch", CONFIGS)
def test_transformers_reads_the_same(tmp_path: Path, arch: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write(tmp_path / f"{arch}.gguf", arch, metadata(arch), gguf_tensors(arch))
    source = open_source(str(path))
    theirs = load_gguf_checkpoint(path, return_tensors=False)["config"]
    shared = theirs.keys() & source.config.keys()
    assert len(shared) >= 7
    assert {key: source.config[key] for key in shared} == {key: theirs[key] for key in shared}

    config = AutoConfig.for_model(**source.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    ours = read_all(source)
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) for name in ours)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_block_types_are_read_as_gguf_reads_them(tmp_path: Path, kind: Kind) -> None:
    tensors = gguf_tensors("llama")
    names = ["token_embd.weight", "blk.1.ffn_down.weight"]
    path = write(tmp_path / "x.gguf", "llama", metadata("llama"), tensors, dict.fromkeys(names, kind))
    embedding, down = (gguf.dequantize(gguf.quantize(tensors[name], kind), kind) for name in names)
    source = open_source(str(path))
    stored_embedding, stored_down = next(source.spec.embedding.tensors()), source.spec.blocks[1].mlp.down.weight
    with open_checkpoint(source) as opened:
        assert opened.stored_dtype(stored_down) == kind.name
        assert np.array_equal(opened.read(stored_down).numpy(), down)
        assert np.array_equal(opened.read(stored_embedding).numpy(), embedding)
        assert np.array_equal(opened.read_rows(stored_embedding, 7, 31).numpy(), embedding[7:31])


def test_inspect_tells_what_a_file_is_stored_as(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = gguf_tensors("llama")
    quantized = {name: Kind.Q8_0 for name, tensor in tensors.items() if name.startswith("blk") and tensor.ndim == 2}
    path = write(tmp_path / "x.gguf", "llama", metadata("llama"), tensors, quantized)
    assert run(app, ["inspect", str(path), "--json"]) == 0
    stored = json.loads(capfd.readouterr().out)["stored_bytes"]
    assert stored["Q8_0"] == sum(tensors[name].size for name in quantized) * 34 // 32
    assert stored["F32"] == 4 * sum(tensor.size for name, tensor in tensors.items() if name not in quantized)
    assert run(app, ["inspect", str(path)]) == 0
    assert "parameters stored as " in (out := capfd.readouterr().out)
    assert "Q8_0 (" in out


def test_rows_of_a_converted_tensor_are_rows_of_the_original(llama: Path) -> None:
    source = open_source(str(llama))
    q_proj = source.spec.blocks[0].attention.inputs[0].weight
    with open_checkpoint(source) as opened:
        assert torch.equal(opened.read_rows(q_proj, 3, 9), opened.read(q_proj)[3:9])


def test_the_vocabulary_is_not_kept(llama: Path) -> None:
    assert "tokenizer.ggml.tokens" not in read_header(llama).metadata
    assert open_source(str(llama)).spec.vocab_size == 48


def test_the_tokenizer_comes_out_of_the_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = ["<pad>", "<start>", "<end>", *"abc", "ab", "bc", "Ġ", *(f"unused{index}" for index in range(39))]
    keys = metadata("gpt2") | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[3] * 3, *[1] * 45],
        "tokenizer.ggml.merges": ["a b", "b c"],
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    source = open_source(str(write(tmp_path / "x.gguf", "gpt2", keys, gguf_tensors("gpt2"))))
    out = tmp_path / "out"
    out.mkdir()
    source.write_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("abc a").input_ids == [tokens.index(token) for token in ("ab", "c", "Ġ", "a")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b"


def test_a_file_without_tokenizer_says_so(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot convert the tokenizer"):
        open_source(str(llama)).write_tokenizer(tmp_path)


def llama3_slowing(theta: float, dim: int) -> Array:
    """As llama.cpp's converter writes it for the rotary scaling of Llama 3.1, with a factor of 8."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = (8192 / wavelengths - 1) / (4 - 1)
    between = 1 / ((1 - smooth) / 8 + smooth)
    table = np.where(wavelengths < 8192 / 4, 1, np.where(wavelengths > 8192, 8, between))
    return table.astype(np.float32)


def test_llama3_scaling_is_recovered_from_its_table(tmp_path: Path) -> None:
    table = llama3_slowing(5e5, 8)
    assert (table[0], table[-1]) == (1, 8)
    assert 1 < table[2] < 8
    keys, tensors = metadata("llama", rope__freq_base=5e5), gguf_tensors("llama")
    path = write(tmp_path / "x.gguf", "llama", keys, tensors | {"rope_freqs.weight": table})
    source = open_source(str(path))
    rotary = source.spec.blocks[0].attention.rotary
    assert rotary is not None
    expected = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert dict(rotary.scaling) == expected | {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    with open_checkpoint(source) as opened:
        assert opened.ignored == ("rope_freqs.weight",)
        assert opened.unknown == ()


def test_a_table_that_follows_no_known_rule_is_refused(tmp_path: Path) -> None:
    table = {"rope_freqs.weight": np.array([1, 3, 2, 8], np.float32)}
    path = write(tmp_path / "x.gguf", "llama", metadata("llama"), gguf_tensors("llama") | table)
    with pytest.raises(UnsupportedError, match="rotary frequencies follow no rule"):
        open_source(str(path))


def test_longrope_factors_are_read(tmp_path: Path) -> None:
    factors = {"long_factor": [1.0, 2.5], "short_factor": [1.0, 1.5]}
    tables = {f"rope_factors_{key[:-7]}.weight": np.array(value, np.float32) for key, value in factors.items()}
    keys = metadata("phi3", rope__scaling__original_context_length=32)
    path = write(tmp_path / "x.gguf", "phi3", keys, gguf_tensors("phi3") | tables)
    config = {**CONFIGS["phi3"], "rope_scaling": {"type": "longrope", **factors}}
    assert open_source(str(path)).spec == spec_from_config({**config, "original_max_position_embeddings": 32})


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    keys = metadata("qwen2", rope__scaling__type="linear", rope__scaling__factor=4.0)
    path = write(tmp_path / "x.gguf", "qwen2", keys, gguf_tensors("qwen2"))
    scaled = {**CONFIGS["qwen2"], "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert open_source(str(path)).spec == spec_from_config(scaled)


def test_a_cut_off_file_is_refused_wherever_it_ends(llama: Path) -> None:
    whole = llama.read_bytes()
    for size_bytes in [*range(0, 4096, 31), len(whole) - 1]:
        llama.write_bytes(whole[:size_bytes])
        with pytest.raises(ModelError) as caught:
            read_header(llama)
        assert caught.value.where == str(llama)


def test_a_file_cut_off_in_its_weights_names_the_tensor(llama: Path) -> None:
    llama.write_bytes(llama.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"output\.weight ends at byte \d+, and the file has \d+"):
        open_source(str(llama))


def put(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + value + raw[at + len(value) :]


def put_behind(name: str, gap: int, value: bytes) -> Callable[[bytes], bytes]:
    """Write `value` so many bytes behind the name of a tensor or key."""
    return lambda raw: put(raw.index(name.encode()) + len(name) + gap, value)(raw)


HUGE = (1 << 62).to_bytes(8, "little")
# Behind the name of a matrix: number of axes (4 bytes), axes (2 x 8), type (4), offset (8).
TYPE, OFFSET = 4 + 16, 4 + 16 + 4


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (put(0, b"GGML"), ModelError, "not a GGUF file"),
        (put(4, (1).to_bytes(4, "little")), UnsupportedError, "GGUF version 1 is not supported"),
        (put(4, (99).to_bytes(4, "little")), UnsupportedError, "GGUF version 99 is not supported"),
        (put(4, (3).to_bytes(4, "big")), UnsupportedError, "big-endian"),
        (put(8, HUGE), ModelError, "ends inside its header"),
        (put(16, HUGE), ModelError, "ends inside its header"),
        (put_behind("general.architecture", 4, HUGE), ModelError, "ends inside its header"),
        (put_behind("general.architecture", 0, b"\x63"), ModelError, "value of unknown type 99"),
        (put_behind("general.architecture", 12, b"\xff\xff"), ModelError, "not UTF-8"),
        (put_behind("general.architecture", 12, b"whale"), UnsupportedError, "architecture 'whale' is not supported"),
        (put_behind("llama.block_coun", 0, b"x"), ModelError, r"lacks llama\.block_count"),
        (lambda raw: raw.replace(b"bos_token_id", b"eos_token_id"), ModelError, "eos_token_id is there twice"),
        (lambda raw: raw.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), ModelError, r"ffn_up\.weight is stored twice"),
        (put_behind("blk.1.ffn_up.weight", 0, b"\x09"), ModelError, "has 9 axes"),
        (put_behind("blk.1.ffn_up.weight", TYPE, b"\x63"), UnsupportedError, r"ffn_up\.weight has the unknown type 99"),
        (put_behind("blk.1.ffn_up.weight", TYPE, b"\x0f"), ModelError, "which Q8_K cannot have"),
        (put_behind("blk.1.ffn_up.weight", OFFSET, bytes(8)), ModelError, "overlaps another tensor"),
        (put_behind("blk.1.ffn_up.weight", OFFSET, HUGE), ModelError, "ends at byte"),
    ],
)  # fmt: skip
def test_a_damaged_or_unknown_file_is_refused(
    llama: Path, damage: Callable[[bytes], bytes], error: type[ModelError], message: str
) -> None:
    damaged = damage(llama.read_bytes())
    assert damaged != llama.read_bytes()
    llama.write_bytes(damaged)
    with pytest.raises(error, match=message) as caught:
        open_source(str(llama))
    assert str(caught.value.where).startswith(str(llama))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count", 0, "the metadata makes no sense"),
        ("rope.dimension_count", "eight", "the metadata makes no sense"),
        ("context_length", "long", "the config makes no sense"),
        ("block_count", 4_000_000_000, "4000000000 blocks in 21 tensors"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    keys = metadata("llama") | {f"llama.{key}": value}
    path = write(tmp_path / "x.gguf", "llama", keys, gguf_tensors("llama"))
    with pytest.raises(ModelError, match=message) as caught:
        open_source(str(path))
    assert caught.value.where == str(path)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", "llama", metadata("llama") | {"split.count": 3}, gguf_tensors("llama"))
    with pytest.raises(UnsupportedError, match="one part of several") as caught:
        open_source(str(path))
    assert "--merge" in str(caught.value.hint)


def test_a_type_that_cannot_be_read_back_is_refused(llama: Path) -> None:
    llama.write_bytes(put_behind("blk.1.ffn_up.weight", TYPE, bytes([Kind.I32]))(llama.read_bytes()))
    with pytest.raises(UnsupportedError, match=r"mlp\.up_proj\.weight is stored as I32"):
        open_checkpoint(open_source(str(llama)))


def test_a_missing_tensor_is_named_as_the_checkpoint_would(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama")
    del tensors["blk.1.ffn_up.weight"]
    source = open_source(str(write(tmp_path / "x.gguf", "llama", metadata("llama"), tensors)))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        open_checkpoint(source)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama")
    name = "blk.1.ffn_up.weight"
    path = write(tmp_path / "x.gguf", "llama", metadata("llama"), tensors, {name: Kind.Q8_0})
    start = read_header(path).tensors[name].offset
    path.write_bytes(put(start, np.float16(np.inf).tobytes())(path.read_bytes()))
    source = open_source(str(path))
    with open_checkpoint(source) as opened, pytest.raises(ModelError, match="holds NaN or infinity: 32 of 2048 values"):
        opened.read(source.spec.blocks[1].mlp.inputs[1].weight)
