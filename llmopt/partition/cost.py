"""What the parts of a model cost on a group of devices: seconds and bytes, from the description alone.

The parts are the blocks, the first with the embedding, and the head with the final norm; `llmopt.partition.work` says
what they take on a device, and a block also takes what its launch takes. Tensor parallelism divides products by heads,
channels and vocabulary, and adds two all-reduces a block, as a ring: 2 (t - 1) messages of a t-th (Thakur et al. 2005).
Devices that work at the same time, as the ranks of a stage and full pipelines do, may have memory and caches in common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmopt.errors import UsageError
from llmopt.model.spec import Block, Linear, ModelSpec
from llmopt.model.storage import stored_bytes
from llmopt.partition.device import MANY_TOKENS, DeviceClass, Link, Speed
from llmopt.partition.plan import Workload
from llmopt.partition.problem import Array
from llmopt.partition.work import Product, activation_bytes, attention_s, passing_bytes, passing_s, product_s, share_of
from llmopt.quantize.scheme import Scheme, parse_scheme

DTYPE_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LOGIT_BYTES = _RANGE_BYTES = 4


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
    """One number for each part on one device of a group, [items]; `activation_bytes` is there once a stage.

    `tied_bytes` is what a plan of one stage saves, where the head reads the embedding's table.
    """

    prefill_s: Array
    decode_s: Array
    weight_bytes: Array
    kv_bytes: Array
    activation_bytes: float
    tied_bytes: float


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
    def prefill_hop_bytes(self) -> float:
        """What goes from stage to stage with a micro-batch of prompts."""
        return self._hidden_bytes(self.cut.batch * self._chunk)

    @property
    def decode_hop_bytes(self) -> float:
        """What goes from stage to stage with a token of each sequence."""
        return self._hidden_bytes(self.cut.batch)

    def waking_s(self, device: DeviceClass) -> float:
        """What a token takes longer on a stage that waits for others: with several groups underway none does."""
        return device.waking_s if self.cut.groups == 1 else 0.0

    @property
    def _chunk(self) -> int:
        return -(-self.workload.prompt // self.cut.parts)

    def on(self, group: Group) -> ItemCosts:
        """Costs of every part on a group.

        Raises:
            UsageError: nothing is known of the group's speed in the dtype or a scheme.
        """
        known: dict[object, _Item] = {}
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
            activation_bytes=self._activation_bytes(group),
            tied_bytes=self._weight_bytes(self.spec.head, group) / group.degree if self.spec.tied else 0.0,
        )

    def _signature(self, block: Block) -> object:
        shapes = tuple(
            (one.out_features, one.in_features, one.bias, self.precision.schemes.get(one.name))
            for one in block.linears()
        )
        return shapes, block.attention.heads, block.attention.kv_heads, block.attention.window

    def _block(self, block: Block, group: Group) -> "_Item":
        prefill, decode = self._prefill, self._decode
        weights = sum(self._weight_bytes(one, group) for one in block.linears()) / group.degree
        norms = sum(tensor.count for norm in block.norms() for tensor in norm.tensors())
        return (
            self._block_s(block, group, prefill),
            self._block_s(block, group, decode),
            weights + norms * self.precision.value_bytes,
            self._kv_bytes(block) / group.degree,
        )

    @property
    def _prefill(self) -> "_Step":
        """A micro-batch of prompts, or of what is on average a part of them."""
        ends = [self.workload.prompt * (part + 1) / self.cut.parts for part in range(self.cut.parts)]
        seen = sum(ends) / len(ends)
        return _Step(sequences=self.cut.batch, tokens=self._chunk, seen=seen, together=self.cut.count > 1)

    @property
    def _decode(self) -> "_Step":
        """A token of each sequence, in the middle of the output."""
        seen = self.workload.prompt + self.workload.output / 2
        return _Step(sequences=self.cut.batch, tokens=1, seen=seen, together=self.cut.groups > 1)

    def _block_s(self, block: Block, group: Group, step: "_Step") -> float:
        """The launch, products, attention, what passes between them, and the sums over the ranks of a stage.

        The mask hides, and saves nothing: a token is compared with all that are in the cache.
        """
        attention, device = block.attention, group.device
        seen = step.seen if attention.window is None else min(step.seen, attention.window + step.tokens - 1)
        pairs = step.tokens * seen
        writers = (attention.output, block.mlp.down)
        value = self.precision.value_bytes
        products = sum(
            self._product_s(one, group, step, writes=one in writers, in_block=True) for one in block.linears()
        )
        flops = 4 * attention.q_size * pairs * step.sequences / group.degree
        read = 2 * attention.kv_size * seen * step.sequences * value / group.degree
        attending = attention_s(flops, read, device, speed_of(group, None, self.precision.dtype))
        moved = passing_bytes(block, step.all_tokens, pairs, value, group.degree)
        sums = 2 * group.all_reduce_s(self._hidden_bytes(step.all_tokens))
        rounded = [one for one in writers if self._rounds(one)]
        # The ranks agree on the range of each token of what is cut by inputs.
        sums += len(rounded) * group.all_reduce_s(2 * _RANGE_BYTES * step.all_tokens)
        passing = passing_s(moved, device.passing_gb_per_s)
        return (device.launch_s + products + attending + passing) / step.keeps(group) + sums

    def _rounds(self, linear: Linear) -> bool:
        scheme = self.precision.schemes.get(linear.name)
        return scheme is not None and scheme.activation_bits == 8

    def _embedding(self, group: Group) -> "_Item":
        positions = self.spec.embedding.positions
        learned = sum(tensor.count for tensor in positions.tensors()) if positions is not None else 0
        size = self._table_bytes(group) / group.degree + learned * self.precision.value_bytes
        tokens = self.cut.batch * self._chunk
        adding = group.all_reduce_s(self._hidden_bytes(tokens)), group.all_reduce_s(self._hidden_bytes(self.cut.batch))
        return (*adding, size, 0.0)

    def _head(self, group: Group) -> "_Item":
        batch, before = self.cut.batch, self.spec.before_head
        linears = [self.spec.head] if before is None else [before, self.spec.head]
        step = _Step(sequences=batch, tokens=1, seen=0.0, together=self.cut.groups > 1)
        seconds = sum(self._product_s(one, group, step) for one in linears) / step.keeps(group)
        # Each rank finds the likeliest token of its rows; a value and an index for each sequence are compared.
        seconds += group.all_reduce_s(2 * _LOGIT_BYTES * batch)
        weights = sum(self._weight_bytes(one, group) for one in linears) / group.degree
        norm = sum(tensor.count for tensor in self.spec.final_norm.tensors()) * self.precision.value_bytes
        # A prompt in parts has logits behind its last part only: its share is what a part takes on average.
        return seconds / self.cut.parts, seconds, weights + norm, 0.0

    def _product_s(
        self, linear: Linear, group: Group, step: "_Step", *, writes: bool = False, in_block: bool = False
    ) -> float:
        speed = speed_of(group, self.precision.schemes.get(linear.name), self.precision.dtype)
        rows, columns, size = share_of(linear, self._weight_bytes(linear, group), group.degree, writes=writes)
        product = Product(
            rows=rows,
            columns=columns,
            weight_bytes=size,
            tokens=step.all_tokens,
            value_bytes=self.precision.value_bytes,
        )
        return product_s(product, speed) * (speed.block_factor(step.all_tokens) if in_block else 1.0)

    def _kv_bytes(self, block: Block) -> float:
        context, window = self.workload.context, block.attention.window
        kept = context if window is None else min(context, window)
        return 2 * block.attention.kv_size * kept * self.cut.sequences * self.precision.value_bytes

    def _weight_bytes(self, linear: Linear, group: Group) -> float:
        scheme = self.precision.schemes.get(linear.name)
        size = self._stored_bytes(linear.out_features, linear.in_features, scheme, group)
        return size + (linear.out_features * self.precision.value_bytes if linear.bias else 0)

    def _table_bytes(self, group: Group) -> float:
        embedding = self.spec.embedding
        scheme = self.precision.schemes.get(embedding.name)
        return self._stored_bytes(embedding.vocab_size, embedding.width, scheme, group)

    def _stored_bytes(self, rows: int, columns: int, scheme: Scheme | None, group: Group) -> float:
        """Of a matrix; codes that a device has no products for may become floats there."""
        own = None if scheme is None else _own_speed(group.device, scheme)
        if scheme is None or (own is None and group.device.expands):
            return rows * columns * self.precision.value_bytes
        multiple = 1 if own is None else own.padded_to
        return stored_bytes(rows, -(-columns // multiple) * multiple, scheme)

    def _hidden_bytes(self, tokens: int) -> float:
        return float(tokens * self.spec.hidden_size * self.precision.value_bytes)

    def _activation_bytes(self, group: Group) -> float:
        """At the widest place of a block, or the logits; and what the allocator keeps beside."""
        tokens, pairs = self.cut.batch * self._chunk, self._chunk * self.workload.prompt
        value, degree = self.precision.value_bytes, group.degree
        shapes = {self._signature(block): block for block in self.spec.blocks}
        inside = max(activation_bytes(block, tokens, pairs, value, degree) for block in shapes.values())
        logits = self.cut.batch * self.spec.vocab_size * _LOGIT_BYTES / degree
        schemes = {None, *self.precision.schemes.values()}
        slack = max(speed_of(group, scheme, self.precision.dtype).slack for scheme in schemes)
        return max(inside * (1 + slack), logits)


_Item = tuple[float, float, float, float]  # seconds of a prefill and of a token, bytes of weights and cache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What goes through a block at once: `tokens` of each sequence, which see so many; stages `together` or in turn."""

    sequences: int
    tokens: int
    seen: float
    together: bool

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    def keeps(self, group: Group) -> float:
        """What the device's speed comes to: beside others less, as much less as there are few tokens or many."""
        if not self.together and group.degree == 1:
            return 1.0
        device = group.device
        kept = np.interp(np.log(self.all_tokens), [0, np.log(MANY_TOKENS)], [device.shared_token, device.shared])
        return float(kept)


def _own_speed(device: DeviceClass, scheme: Scheme) -> Speed | None:
    """That of a scheme itself, where it is known."""
    known = device.speeds.items()
    return next((speed for name, speed in known if name not in DTYPE_BYTES and parse_scheme(name) == scheme), None)


def speed_of(group: Group, scheme: Scheme | None, dtype: str) -> Speed:
    """How fast a group's devices multiply. Weights alone being integers, a scheme that was not measured is taken to be
    computed in the dtype; integer products have to be known.

    Raises:
        UsageError: nothing is known of it.
    """
    speeds = group.device.speeds
    if scheme is not None:
        own = _own_speed(group.device, scheme)
        if own is not None:
            return own
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
