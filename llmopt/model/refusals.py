"""What is not opened as a model, and what to do instead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.errors import ModelError, UnsupportedError
from llmopt.model.families import families
from llmopt.model.safetensors_files import INDEX

GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT_PICKLES = (
    "a pickle can run code when it is opened; where you trust it, convert it to safetensors: "
    "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER), then give FOLDER"
)


def not_a_model(path: Path) -> ModelError:
    """The error for a file that is not a `.gguf` file."""
    if path.suffix in PICKLE_SUFFIXES:
        return ModelError("pickled weights are not opened", where=str(path), hint=CONVERT_PICKLES)
    hint = "give the folder it lies in" if path.suffix == ".safetensors" else "give a folder or a .gguf file"
    return ModelError("this file is not a model", where=str(path), hint=hint)


def no_config(folder: Path) -> ModelError:
    """The error for a folder without a config: it may hold something else that is a model."""
    gguf = next(folder.glob(f"*{GGUF_SUFFIX}"), None)
    if gguf is not None:
        hint = f"give the file: {gguf}"
    elif _pickles(folder):
        hint = CONVERT_PICKLES
    else:
        hint = "give a Hugging Face model folder, a .gguf file or a name on the Hub"
    return ModelError("the folder holds no config.json", where=str(folder), hint=hint)


def require_safetensors(folder: Path, *, hint: str) -> None:
    """Refuse a folder without safetensors, above all one with pickles in their place; `hint` says where to get them.

    Raises:
        ModelError: naming the folder, or the pickle.
    """
    if (folder / INDEX).exists() or any(folder.glob("*.safetensors")):
        return
    for pickle in _pickles(folder):
        raise not_a_model(pickle)
    raise ModelError("the model has no safetensors file", where=str(folder), hint=hint)


def require_plain(config: Mapping[str, Any], *, where: str, quantized: bool = False) -> None:
    """Refuse what a spec cannot say: weights that are quantized, unless they may be, and a model that is code.

    Raises:
        UnsupportedError: naming the method of quantization, or the type of the model.
    """
    quantization = config.get("quantization_config")
    if quantization and not (quantized and isinstance(quantization, Mapping)):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        what = f"the weights are already quantized ({method or 'by an unknown method'})"
        raise UnsupportedError(what, where=where, hint="give the model that it was made from")
    if config.get("auto_map") and config.get("model_type") not in families():
        what = f"the model brings its own code for model_type {config.get('model_type')!r}"
        hint = f"llmopt builds models from their config alone; it knows {', '.join(sorted(families()))}"
        raise UnsupportedError(what, where=where, hint=hint)


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
