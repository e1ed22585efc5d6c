"""What the parts of a model cost on a group of devices: seconds and bytes, from the description alone.

The parts are the blocks, the first with the embedding, and the head with the final norm. A product takes what is
longer, its operations at the speed that the device reaches or its weights at the bandwidth that it reaches (the
roofline, Williams et al. 2009); a block also takes what its launch takes. Tensor parallelism divides products by heads,
channels and vocabulary, and adds two all-reduces a block, as a ring: 2 (t - 1) messages of a t-th (Thakur et al. 2005).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.errors import UsageError
from llmopt.model.spec import Block, Linear, ModelSpec
from llmopt.model.storage import stored_bytes
from llmopt.partition.cluster import DeviceClass, Link, Speed
from llmopt.partition.plan import Workload
from llmopt.partition.problem import Array
from llmopt.quantize.scheme import Scheme, parse_scheme

DTYPE_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A batch of one replica in micro-batches: of whole sequences as far as there are enough, else of parts of prompts.

    A prompt in parts is decoded whole.
    """

    sequences: int  # of the replica
    groups: int = 1
    parts: int = 1

    @property
    def count(self) -> int:
        """Micro-batches of a prefill."""
        return self.groups * self.parts

    @property
    def batch(self) -> int:
        """Sequences of the largest micro-batch."""
        return -(-self.sequences // self.groups)


def cut(count: int, sequences: int) -> Cut:
    """`count` micro-batches of so many sequences."""
    if count <= sequences:
        return Cut(sequences=sequences, groups=count)
    return Cut(sequences=sequences, parts=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The dtype of activations and cache, and the scheme of each quantized linear and table by its name."""

    dtype: str
    schemes: Mapping[str, Scheme]

    @property
    def value_bytes(self) -> int:
        """Of a value of the dtype."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """`degree` devices of one class in one node, and what an all-reduce over them takes."""

    device: DeviceClass
    kind: str
    degree: int = 1
    link: Link | None = None
    sums: Link | None = None

    def all_reduce_s(self, size_bytes: float) -> float:
        """Adding up `size_bytes` that each device has."""
        if self.degree == 1:
            return 0.0
        if self.sums is not None:
            return self.sums.seconds(size_bytes)
        assert self.link is not None
        return 2 * (self.degree - 1) * self.link.seconds(size_bytes / self.degree)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemCosts:
    """One number for each part on one device of a group, [items]; `activation_bytes` is there once a stage."""

    prefill_s: Array
    decode_s: Array
    weight_bytes: Array
    kv_bytes: Array
    activation_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """A model at work: what its parts take on any group of devices."""

    spec: ModelSpec
    precision: Precision
    workload: Workload
    cut: Cut

    @property
    def items(self) -> int:
        """Parts: every block, and the head."""
        return len(self.spec.blocks) + 1

    @property
    def tied_bytes(self) -> float:
        """What a plan of one stage saves, where the head reads the embedding's table."""
        return self._weight_bytes(self.spec.head) if self.spec.tied else 0.0

    @property
    def prefill_hop_bytes(self) -> float:
        """What goes from stage to stage with a micro-batch of prompts."""
        return self._hidden_bytes(self.cut.batch * self._chunk)

    @property
    def decode_hop_bytes(self) -> float:
        """What goes from stage to stage with a token of each sequence."""
        return self._hidden_bytes(self.cut.batch)

    @property
    def _chunk(self) -> int:
        return -(-self.workload.prompt // self.cut.parts)

    def on(self, group: Group) -> ItemCosts:
        """Costs of every part on a group.

        Raises:
            UsageError: nothing is known of the group's speed in the dtype or a scheme.
        """
        known: dict[object, tuple[float, float, float, float]] = {}
        blocks = []
        for block in self.spec.blocks:
            key = self._signature(block)
            if key not in known:
                known[key] = self._block(block, group)
            blocks.append(known[key])
        rows = np.array([*blocks, self._head(group)], dtype=float)
        rows[0] += self._embedding(group)
        return ItemCosts(
            prefill_s=rows[:, 0],
            decode_s=rows[:, 1],
            weight_bytes=rows[:, 2],
            kv_bytes=rows[:, 3],
            activation_bytes=self._activation_bytes(group.degree),
        )

    def _signature(self, block: Block) -> object:
        shapes = tuple(
            (one.out_features, one.in_features, one.bias, self.precision.schemes.get(one.name))
            for one in block.linears()
        )
        return shapes, block.attention.heads, block.attention.kv_heads, block.attention.window

    def _block(self, block: Block, group: Group) -> tuple[float, float, float, float]:
        tokens, batch = self.cut.batch * self._chunk, self.cut.batch
        prefill = sum(self._product_s(one, tokens, group) for one in block.linears())
        decode = sum(self._product_s(one, batch, group) for one in block.linears())
        prefill += self._attention_s(block, group, prefill=True) + group.device.launch_s
        decode += self._attention_s(block, group, prefill=False) + group.device.launch_s
        prefill += 2 * group.all_reduce_s(self._hidden_bytes(tokens))
        decode += 2 * group.all_reduce_s(self._hidden_bytes(batch))
        weights = sum(self._weight_bytes(one) for one in block.linears()) / group.degree
        norms = sum(tensor.count for norm in block.norms() for tensor in norm.tensors())
        return prefill, decode, weights + norms * self.precision.value_bytes, self._kv_bytes(block) / group.degree

    def _embedding(self, group: Group) -> tuple[float, float, float, float]:
        positions = self.spec.embedding.positions
        learned = sum(tensor.count for tensor in positions.tensors()) if positions is not None else 0
        size = self._table_bytes() / group.degree + learned * self.precision.value_bytes
        tokens = self.cut.batch * self._chunk
        reading = group.all_reduce_s(self._hidden_bytes(tokens)), group.all_reduce_s(self._hidden_bytes(self.cut.batch))
        return (*reading, size, 0.0)

    def _head(self, group: Group) -> tuple[float, float, float, float]:
        batch, before = self.cut.batch, self.spec.before_head
        linears = [self.spec.head] if before is None else [before, self.spec.head]
        seconds = sum(self._product_s(one, batch, group) for one in linears)
        # Each rank finds the likeliest token of its rows; a value and an index for each sequence are compared.
        seconds += group.all_reduce_s(2 * _LOGIT_BYTES * batch)
        weights = sum(self._weight_bytes(one) for one in linears) / group.degree
        norm = sum(tensor.count for tensor in self.spec.final_norm.tensors()) * self.precision.value_bytes
        # A prompt in parts has logits behind its last part only: its share is what a part takes on average.
        return seconds / self.cut.parts, seconds, weights + norm, 0.0

    def _product_s(self, linear: Linear, tokens: int, group: Group) -> float:
        scheme = self.precision.schemes.get(linear.name)
        speed = speed_of(group, scheme, self.precision.dtype)
        flops = 2 * tokens * linear.out_features * linear.in_features
        return max(flops / speed.flops, self._weight_bytes(linear) / speed.bytes_per_s) / group.degree

    def _attention_s(self, block: Block, group: Group, *, prefill: bool) -> float:
        """Two products with the cache, 4 FLOPs a channel of the queries and token seen; the cache is read once."""
        speed = speed_of(group, None, self.precision.dtype)
        prompt, window = self.workload.prompt, block.attention.window
        if prefill:
            near = prompt if window is None else min(prompt, window)
            seen = (near * (near + 1) / 2 + (prompt - near) * near) / self.cut.parts
            read = seen / self._chunk
        else:
            context = prompt + self.workload.output // 2  # on average
            seen = read = context if window is None else min(context, window)
        flops = 4 * block.attention.q_size * seen * self.cut.batch
        size = 2 * block.attention.kv_size * read * self.cut.batch * self.precision.value_bytes
        return max(flops / speed.flops, size / speed.bytes_per_s) / group.degree

    def _kv_bytes(self, block: Block) -> float:
        context, window = self.workload.context, block.attention.window
        kept = context if window is None else min(context, window)
        return 2 * block.attention.kv_size * kept * self.cut.sequences * self.precision.value_bytes

    def _weight_bytes(self, linear: Linear) -> float:
        scheme = self.precision.schemes.get(linear.name)
        values = linear.out_features * linear.in_features
        weights = (
            values * self.precision.value_bytes
            if scheme is None
            else stored_bytes(linear.out_features, linear.in_features, scheme)
        )
        return weights + (linear.out_features * self.precision.value_bytes if linear.bias else 0)

    def _table_bytes(self) -> float:
        embedding, scheme = self.spec.embedding, self.precision.schemes.get(self.spec.embedding.name)
        if scheme is None:
            return embedding.vocab_size * embedding.width * self.precision.value_bytes
        return stored_bytes(embedding.vocab_size, embedding.width, scheme)

    def _hidden_bytes(self, tokens: int) -> float:
        return float(tokens * self.spec.hidden_size * self.precision.value_bytes)

    def _activation_bytes(self, degree: int) -> float:
        """At the widest place of a block: its input twice, and what its products give; or the logits."""
        tokens = self.cut.batch * self._chunk
        widest = max(
            max(sum(one.out_features for one in branch) for branch in (block.attention.inputs, block.mlp.inputs))
            for block in self.spec.blocks
        )
        inside = tokens * (2 * self.spec.hidden_size + 1.5 * widest / degree) * self.precision.value_bytes
        return max(inside, self.cut.batch * self.spec.vocab_size * _LOGIT_BYTES / degree)


def speed_of(group: Group, scheme: Scheme | None, dtype: str) -> Speed:
    """How fast a group's devices multiply. Weights alone being integers, a scheme that was not measured is taken to be
    computed in the dtype; integer products have to be known.

    Raises:
        UsageError: nothing is known of it.
    """
    speeds = group.device.speeds
    if scheme is not None:
        for name, speed in speeds.items():
            if name not in DTYPE_BYTES and parse_scheme(name) == scheme:
                return speed
        if scheme.activation_bits == 8:
            raise _unknown_speed(group, scheme.name)
    if dtype not in speeds:
        raise _unknown_speed(group, dtype)
    return speeds[dtype]


def _unknown_speed(group: Group, what: str) -> UsageError:
    known = ", ".join(group.device.speeds)
    return UsageError(
        f"nothing is known of how fast {group.kind} is with {what}",
        where=f"devices.{group.kind}.speeds",
        hint=f"add it to the cluster file, or take one of {known} (--dtype, --scheme)",
    )


def prefix(values: Sequence[float] | Array) -> Array:
    """Sums of the first 0, 1, … values, [items + 1]."""
    return np.concatenate([[0.0], np.cumsum(values)])
