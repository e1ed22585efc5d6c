"""Which block sees the whole text and which only a window of it: `layer_types`, and what stood there before it."""

from collections.abc import Sequence

from llmopt.errors import UnsupportedError
from llmopt.model.families import Config
from llmopt.model.families._config import positive
from llmopt.model.families._decoder import Window, window_of

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(config: Config, layer_types: Sequence[str]) -> list[Window]:
    """A window for each block.

    Raises:
        UnsupportedError: a block has another type than the two above.
        ValueError: there are fewer or more types than blocks, or a sliding block without `sliding_window`.
    """
    unknown = sorted(set(layer_types) - {FULL, SLIDING})
    if unknown:
        raise UnsupportedError(f"layer_types with {unknown[0]!r} is not supported")
    if len(layer_types) != positive(config, "num_hidden_layers"):
        raise ValueError(f"{len(layer_types)} layer_types for {config['num_hidden_layers']} layers")
    if SLIDING in layer_types and config.get("sliding_window") is None:
        raise ValueError("layer_types names sliding_attention, and sliding_window is missing")
    return [window_of(config) if kind == SLIDING else None for kind in layer_types]


def qwen_windows(config: Config) -> list[Window]:
    """Qwen 2 and 3: blocks from `max_window_layers` on slide, and only if `use_sliding_window` says so."""
    if not config.get("use_sliding_window"):
        config = {**config, "sliding_window": None}
    blocks, window = positive(config, "num_hidden_layers"), config["sliding_window"]
    first = config["max_window_layers"] if window is not None else blocks
    return windows(config, config.get("layer_types") or [FULL if index < first else SLIDING for index in range(blocks)])
