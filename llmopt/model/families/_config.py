"""Reading a Hugging Face config: every key is read, or refused by name when it asks for what a spec cannot say."""

from collections.abc import Mapping

from llmopt.errors import UnsupportedError
from llmopt.model.families import Config
from llmopt.model.spec import Activation

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# A damaged config must not fill the memory with blocks, or overflow a count of bytes.
BLOCKS_KEYS = ("num_hidden_layers", "n_layer")
MOST_BLOCKS = 10_000
MOST = 2**31

# Keys of neighbouring families, with the values at which they change nothing. A checkpoint that sets one to anything
# else computes something that its family's description would miss.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False, None),
    "attention_multiplier": (1.0, None),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (1.0, None),
    "final_logit_softcapping": (None,),
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "logits_scaling": (1.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "quantization_config": (None,),
    "residual_multiplier": (1.0, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}


def require(config: Config, key: str, *allowed: object) -> None:
    """Refuse a config whose `key` has a value other than those allowed; an absent key is fine.

    Raises:
        UnsupportedError: naming the key and its value.
    """
    if key in config and config[key] not in allowed:
        raise UnsupportedError(f"{key} = {config[key]!r} is not supported", hint="use a model that does not set it")


def require_causal_lm(config: Config, architecture: str) -> None:
    """Refuse what no family here can describe.

    Raises:
        UnsupportedError: the config names another architecture than `architecture`, or sets a key of `_NEUTRAL`.
    """
    named = config.get("architectures") or [architecture]
    if architecture not in named:
        raise UnsupportedError(f"architectures = {named!r} is not supported", hint=f"use a {architecture}")
    for key, neutral in _NEUTRAL.items():
        require(config, key, *neutral)


def positive(config: Config, key: str) -> int:
    """A count or a size.

    Raises:
        KeyError: it is missing.
        ValueError: it is not a positive whole number, or one that no model has.
    """
    value = config[key]
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} = {value!r}, where a positive whole number is needed")
    if value > (most := MOST_BLOCKS if key in BLOCKS_KEYS else MOST):
        raise ValueError(f"{key} = {value}, where no model has more than {most}")
    return value


def activation(config: Config, key: str) -> Activation:
    """The function between the two products of an MLP.

    Raises:
        KeyError: it is missing.
        UnsupportedError: no room here can compute it.
    """
    name = config[key]
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"{key} = {name!r} is not supported", hint=f"known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def eos_token_ids(config: Config) -> tuple[int, ...]:
    """The tokens that end a text: none, one or several."""
    value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list | tuple) else (int(value),)


def dtype(config: Config) -> str:
    """The dtype that the weights were saved with: `dtype` since transformers 5, `torch_dtype` before."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
