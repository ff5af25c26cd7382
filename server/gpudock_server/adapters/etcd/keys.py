"""The schema of the store: all keys of gpudock in etcd. Only this file builds and parses keys.

All keys begin with a prefix, one per installation. A value is JSON, `{"schema": 1, "record": {...}}` (see values.py),
unless noted otherwise. Parts in angle brackets are percent-encoded, so they contain no slash; names, uids and GPU UUIDs
need no encoding.

    /gpudock/v1/
    key                                      value                written by               deleted
    ---------------------------------------  -------------------  -----------------------  ---------------------------
    schema                                   a number: SCHEMA     the first daemon         never
    nodes/<node>                             NodeRecord           the node's daemon        with its lease, seconds
                                                                                           after the daemon
    hosts/<host>/gpus/<uuid>                 Holder               the operation that       when its holder releases it
                                                                  claims the GPU
    hosts/<host>/ports/<protocol>/<port>     Holder               likewise, for a port     likewise
    containers/<name>                        Container (head)     operations, and          with the container
                                                                  observed status
    revisions/containers/<uid>/<number>      ContainerRevision    the operation that       with the container
                                                                  commits it               or when it is pruned
    snapshots/containers/<uid>/<number>      Snapshot of that     the operation that       with the revision
                                             revision's files     replaces the revision
    volumes/<name>                           Volume (head)        operations               with the volume
    revisions/volumes/<uid>/<number>         VolumeRevision       the operation that       with the volume
                                                                  commits it
    operations/<id>                          Operation without    the saga, every step     with a lease, once it ended,
                                             the parts in the                              or when there are too many
                                             next two keys
    arguments/<id>                           OperationArguments   the transaction that     in the transaction that
                                                                  begins the operation     ends the operation
    results/<id>/<size>                      OperationResult      the transaction that     with a lease, or when newer
                                                                  commits the operation    results need the space
    locks/<kind>s/<name>                     the operation's id,  the transaction that     in the transaction that
                                             bare                 begins the operation     ends the operation
    requests/<request_id>                    RequestRecord        likewise                 with a lease, once the
                                                                                           operation ended
    images/<node>/<image id>                 ImageOrigin          the operation that       when the engine no longer
                                                                  commits or pulls it      has the image
    idle/<kind>s                             nothing              a daemon whose watch of  never
                                                                  the kind is idle
    idle/keeper                              nothing              a daemon that has        never
                                                                  compacted its own etcd

- A claim is keyed by host and not by node, so that two daemons on one host, with any node names, never claim the same
  GPU. A claim is created on the condition that it does not exist.
- A revision's number has ten digits, so that keys sort by revision. A container's history is stored in these keys and
  not in etcd's revisions, which compaction deletes.
- An operation's record is written at every step. Its large parts that do not change, such as a spec, are therefore
  stored in keys of their own and written once. A result's key contains the size of its value (bytes, ten digits), so
  that results can be limited by size without reading them. An operation of schema 2 contains both parts; when it is
  continued, it is written in the new form.
- A lock's value has no schema number because it is compared as it is: a daemon with a newer schema must be able to
  release a lock of an older one.
- A lock is on a name; an operation on several objects holds one lock on each.
- A watch reads the heads, locks and idle key of a kind through one etcd range that spans all three and everything in
  between, because only a single watch delivers changes in order. The range for volumes also spans the heads of
  containers, which name the volumes that they mount. A put at the idle key reaches every watch of the kind and tells it
  how far it has come. (etcd's own progress requests may overtake events before 3.5.8.)
- The version that callers compare is the mod_revision of the key; 0 means that the key does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from gpudock_server.model.claims import ClaimKey, GpuKey, PortKey
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol

# To be raised when an older daemon cannot read, or would damage, what this one writes.
SCHEMA = 4

DEFAULT_PREFIX = "/gpudock/v1/"


@dataclass(frozen=True, slots=True)
class KeyRange:
    """All keys from `start` (inclusive) to `end` (exclusive)."""

    start: bytes
    end: bytes

    def after(self, key: bytes) -> KeyRange:
        """The part of the range after `key`."""
        return KeyRange(key + b"\0", self.end)

    def holds(self, key: bytes) -> bool:
        """Whether `key` is in the range."""
        return self.start <= key < self.end

    def rest(self, key: bytes) -> bytes:
        """The part of `key` after the range's common prefix; the same for an object's head and its lock."""
        return key.removeprefix(self.start)


@dataclass(frozen=True, slots=True)
class WatchKeys:
    """The keys that a watch of one kind of object reads. `referring`: heads of another kind that name these objects."""

    heads: KeyRange
    locks: KeyRange
    idle: bytes
    referring: KeyRange | None = None

    @property
    def span(self) -> KeyRange:
        """The smallest range with all of these keys, and others."""
        ranges = [self.heads, self.locks, *([self.referring] if self.referring else [])]
        starts, ends = [keys.start for keys in ranges], [keys.end for keys in ranges]
        return KeyRange(min(*starts, self.idle), max(*ends, self.idle + b"\0"))


class Keys:
    """Builds keys below `prefix`, which begins and ends with a slash."""

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        if not (prefix.startswith("/") and prefix.endswith("/") and prefix.isascii()):
            raise ValueError(f"prefix {prefix!r} must be ASCII and begin and end with a slash")
        self._prefix = prefix

    def schema(self) -> bytes:
        """The number of the schema of all records."""
        return self._key("schema")

    def node(self, node: str) -> bytes:
        """The record of a node's daemon."""
        return self._key("nodes", node)

    def nodes(self) -> KeyRange:
        """The records of all daemons."""
        return self._below("nodes")

    def claim(self, host: str, key: ClaimKey) -> bytes:
        """A claim of a GPU or port of a host."""
        match key:
            case GpuKey(uuid):
                return self._key("hosts", host, "gpus", uuid)
            case PortKey(protocol, port):
                return self._key("hosts", host, "ports", protocol.value, str(port))

    def claims(self, host: str) -> KeyRange:
        """All claims of a host."""
        return self._below("hosts", host)

    def claim_of(self, host: str, key: bytes) -> ClaimKey:
        """The claim of a key in `claims(host)`."""
        match [unquote(part) for part in key.removeprefix(self.claims(host).start).decode("ascii").split("/")]:
            case ["gpus", uuid]:
                return GpuKey(uuid)
            case ["ports", protocol, port]:
                return PortKey(Protocol(protocol), int(port))
        raise ValueError(f"{key!r} is not the key of a claim")

    @staticmethod
    def last_segment(key: bytes) -> str:
        """The last part of a key: a name, an id or a number."""
        return unquote(key.decode("ascii", errors="replace").rpartition("/")[2])

    def container(self, name: str) -> bytes:
        """A container's head."""
        return self._key("containers", name)

    def containers(self) -> KeyRange:
        """The heads of all containers, in the order of their names."""
        return self._below("containers")

    def lock(self, kind: ResourceKind, name: str) -> bytes:
        """The lock on an object, or on the name of an object being created."""
        return self._key("locks", f"{kind.value}s", name)

    def locks(self, kind: ResourceKind) -> KeyRange:
        """All locks on objects of a kind, in the order of their names."""
        return self._below("locks", f"{kind.value}s")

    def all_locks(self) -> KeyRange:
        """All locks."""
        return self._below("locks")

    def watched(self, kind: ResourceKind, heads: KeyRange, referring: KeyRange | None = None) -> WatchKeys:
        """The keys that a watch of the objects of a kind reads."""
        return WatchKeys(heads, self.locks(kind), self._key("idle", f"{kind.value}s"), referring)

    def lock_of(self, key: bytes) -> tuple[ResourceKind, str] | None:
        """Kind and name of the object that a key of `all_locks` locks; None for a kind unknown to this version."""
        kind, _, name = key.removeprefix(self.all_locks().start).decode("ascii").partition("/")
        kinds = {f"{member.value}s": member for member in ResourceKind}
        return (kinds[kind], unquote(name)) if kind in kinds else None

    def container_revision(self, uid: str, number: int) -> bytes:
        """One revision of a container."""
        return self._key("revisions", "containers", uid, f"{number:010d}")

    def container_revisions(self, uid: str) -> KeyRange:
        """All revisions of a container, oldest first."""
        return self._below("revisions", "containers", uid)

    def container_snapshot(self, uid: str, number: int) -> bytes:
        """The snapshot of a revision's files, or the reason why there is none."""
        return self._key("snapshots", "containers", uid, f"{number:010d}")

    def container_snapshots(self, uid: str) -> KeyRange:
        """All snapshots of a container, oldest first."""
        return self._below("snapshots", "containers", uid)

    def volume(self, name: str) -> bytes:
        """A volume's head."""
        return self._key("volumes", name)

    def volumes(self) -> KeyRange:
        """The heads of all volumes, in the order of their names."""
        return self._below("volumes")

    def volume_revision(self, uid: str, number: int) -> bytes:
        """One revision of a volume."""
        return self._key("revisions", "volumes", uid, f"{number:010d}")

    def volume_revisions(self, uid: str) -> KeyRange:
        """All revisions of a volume, oldest first."""
        return self._below("revisions", "volumes", uid)

    def operation(self, operation_id: str) -> bytes:
        """The record of an operation."""
        return self._key("operations", operation_id)

    def operations(self) -> KeyRange:
        """The records of all operations, in the order of their ids."""
        return self._below("operations")

    def arguments(self, operation_id: str) -> bytes:
        """The arguments of an operation."""
        return self._key("arguments", operation_id)

    def result(self, operation_id: str, size: int) -> bytes:
        """The result of an operation; `size` is that of its value in bytes."""
        return self._key("results", operation_id, f"{size:010d}")

    def results_of(self, operation_id: str) -> KeyRange:
        """The result of an operation, of any size."""
        return self._below("results", operation_id)

    def results(self) -> KeyRange:
        """The results of all operations, in the order of their ids: the newest first."""
        return self._below("results")

    def maintenance_marker(self) -> bytes:
        """An empty key, put so that etcd updates its count of freed space."""
        return self._key("idle", "keeper")

    def request(self, request_id: str) -> bytes:
        """The record of a caller's request id."""
        return self._key("requests", request_id)

    def image_origin(self, node: str, image_id: str) -> bytes:
        """The origin of an image of a node's engine."""
        return self._key("images", node, image_id)

    def image_origins(self, node: str) -> KeyRange:
        """The origins of all images of a node's engine."""
        return self._below("images", node)

    def _key(self, *parts: str) -> bytes:
        # A part that is not UTF-8 comes from a foreign value; no such key exists, but looking it up must not fail.
        quoted = (quote(part, safe="", errors="surrogateescape") for part in parts)
        return (self._prefix + "/".join(quoted)).encode("ascii")

    def _below(self, *parts: str) -> KeyRange:
        start = self._key(*parts)
        # "0" is the character after "/", so the range is every key that continues with a slash.
        return KeyRange(start + b"/", start + b"0")
