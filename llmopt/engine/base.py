"""What every engine offers, so that measuring and generating need not know which one they have."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Stream(Protocol):
    """One sequence with its KV cache."""

    def feed(self, ids_T: TokenIds) -> Logits:
        """Append tokens, shape [T], and give the logits behind the last one, shape [vocab_size]."""
        ...


class Engine(Protocol):
    """A model, ready to compute."""

    @property
    def name(self) -> str:
        """Program and version, such as `onnxruntime 1.32.0`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the last axis of the logits."""
        ...

    def logits(self, ids_BT: TokenIds) -> Logits:
        """Logits at every position, shape [batch, tokens, vocab_size], no cache kept."""
        ...

    def stream(self, capacity: int) -> Stream:
        """An empty sequence with room for `capacity` tokens."""
        ...
