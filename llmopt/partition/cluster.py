"""What a model is to run on: kinds of devices, how many of each a node has, and the links between them.

A cluster file is YAML for people to edit. Whatever it says in GB, TFLOPS, GB/s and microseconds is bytes, operations,
bytes a second and seconds everywhere else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from llmopt.errors import RecipeError, near_match
from llmopt.partition.device import DeviceClass, Link
from llmopt.recipe.document import Document, parse
from llmopt.recipe.load import first_mistake
from llmopt.recipe.schema import Section

SCHEMA = "llmopt.cluster/1"
KNOWN_DEVICES = "devices.yaml"

_MOST_DEVICES = 100_000
_LARGEST_BYTES = 1_000_000

Count = Annotated[int, Field(ge=1, le=_MOST_DEVICES)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Node(Section):
    """Machines that are all alike."""

    name: Name
    """Begins the names of its devices; with a count above 1 a number follows."""
    count: Count = 1
    """How many of them there are."""
    devices: Annotated[dict[str, Count], Field(min_length=1)]
    """How many devices of each class one of them has, in the order in which they are used."""
    link: Link | None = None
    """Between its devices. null: there is but one."""
    sums: Link | None = None
    """An all-reduce over its devices, where it was measured. null: a ring over `link`."""

    @model_validator(mode="after")
    def _has_a_link(self) -> "Node":
        if self.link is None and sum(self.devices.values()) > 1:
            what = f"node {self.name} has several devices and no link between them"
            raise PydanticCustomError("refused", "{what}", {"what": what, "hint": "add link: {latency_us, gb_per_s}"})
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device: its name, its class, and which of the machines it is in."""

    name: str
    kind: str
    node: int


class Cluster(Section):
    """Devices and links. See docs/partition.md for an example."""

    schema_: Annotated[Literal["llmopt.cluster/1"], Field(alias="schema")]
    """The version of this language."""
    devices: Annotated[dict[Name, DeviceClass], Field(default_factory=dict)]
    """Classes of devices by name; those that llmopt knows need not be here."""
    nodes: Annotated[tuple[Node, ...], Field(strict=False, min_length=1)]
    """The machines."""
    between: Link | None = None
    """Between machines. null: there is but one."""
    currency: str = "USD"
    """Of the prices."""

    @model_validator(mode="after")
    def _hangs_together(self, info: ValidationInfo) -> "Cluster":
        del info
        known = known_devices()
        for node in self.nodes:
            for kind in node.devices:
                if kind not in self.devices and kind not in known:
                    what = f"node {node.name} has devices of the class {kind!r}, which nobody knows"
                    hint = near_match(kind, [*self.devices, *known])
                    raise PydanticCustomError("refused", "{what}", {"what": what, "hint": hint})
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            raise PydanticCustomError("refused", "{what}", {"what": "two nodes have one name", "hint": "rename one"})
        self._require_sane_counts()
        return self

    def _require_sane_counts(self) -> None:
        if sum(node.count * sum(node.devices.values()) for node in self.nodes) > _MOST_DEVICES:
            what = f"more than {_MOST_DEVICES:,} devices"
            raise PydanticCustomError("refused", "{what}", {"what": what, "hint": "are the counts right?"})
        if self.between is None and sum(node.count for node in self.nodes) > 1:
            hint = "add between: {latency_us, gb_per_s}"
            raise PydanticCustomError("refused", "{what}", {"what": "several nodes, no link between", "hint": hint})

    def device_class(self, kind: str) -> DeviceClass:
        """What is known of a class; what the file says goes before what llmopt ships."""
        return self.devices[kind] if kind in self.devices else known_devices()[kind]

    def all_devices(self) -> tuple[Device, ...]:
        """Every device, machine by machine in the order of the file."""
        return tuple(self._each_device())

    def machine(self, index: int) -> Node:
        """The node that the `index`-th machine is one of."""
        for node in self.nodes:
            if index < node.count:
                return node
            index -= node.count
        raise IndexError(index)

    def _each_device(self) -> Iterator[Device]:
        index = 0
        for node in self.nodes:
            for number in range(node.count):
                prefix = node.name if node.count == 1 else f"{node.name}{number}"
                for kind, count in node.devices.items():
                    for one in range(count):
                        yield Device(name=f"{prefix}/{kind}:{one}", kind=kind, node=index)
                index += 1


class _KnownDevices(Section):
    devices: dict[Name, DeviceClass]


@cache
def known_devices() -> Mapping[str, DeviceClass]:
    """Devices from public data sheets, for planning hardware that one does not have."""
    text = (files("llmopt.partition") / KNOWN_DEVICES).read_text(encoding="utf-8")
    return _KnownDevices.model_validate(parse(text, label=KNOWN_DEVICES, folder=Path()).value).devices


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file.

    Raises:
        RecipeError: it cannot be read, or does not say something possible; with the line and what was probably meant.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise RecipeError("this is too large to be a cluster file", where=str(path))
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError("a cluster file is UTF-8 text, and this is not", where=str(path)) from error
    except OSError as error:
        hint = "llmopt probe -o cluster.yaml writes one"
        raise RecipeError(f"the cluster file cannot be read: {error.strerror}", where=str(path), hint=hint) from error
    document = parse(text, label=str(path), folder=path.parent)
    if not isinstance(document.value, dict):
        raise RecipeError("a cluster file is a mapping", where=str(path), hint=f"begin with `schema: {SCHEMA}`")
    return _validated(document)


def cluster_from_json(value: Any) -> Cluster:
    """The cluster that a plan carries.

    Raises:
        ValidationError: it is none.
    """
    return Cluster.model_validate(value)


def to_json(cluster: Cluster) -> dict[str, Any]:
    """As a cluster file says it, classes that llmopt knows written out: what a plan carries and a probe writes."""
    kinds = {kind for node in cluster.nodes for kind in node.devices} | set(cluster.devices)
    whole = cluster.model_copy(update={"devices": {kind: cluster.device_class(kind) for kind in sorted(kinds)}})
    return whole.model_dump(mode="json", by_alias=True, exclude_none=True)


def uncounted(cluster: Cluster) -> list[str]:
    """A note where plans count products, attention and launches alone, because nothing else is known of a class."""
    kinds = sorted({kind for node in cluster.nodes for kind in node.devices})
    bare = [kind for kind in kinds if cluster.device_class(kind).passing_gb_per_s is None]
    return [f"what passes between products is not known, and not counted: {', '.join(bare)}"] if bare else []


def _validated(document: Document) -> Cluster:
    try:
        return Cluster.model_validate(document.value)
    except ValidationError as error:
        raise first_mistake(error, document) from error
