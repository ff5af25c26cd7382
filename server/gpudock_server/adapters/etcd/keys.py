"""The schema of the store: every key that gpudock has in etcd. Nothing else builds or takes apart a key.

All keys begin with a prefix, one per installation. A value is JSON, `{"schema": 1, "record": {...}}` (see values.py),
unless said otherwise. Parts in angle brackets are percent-encoded, so that none of them can hold a slash; for names,
uids and the UUIDs of cards that changes nothing.

    /gpudock/v1/
    key                                      value                written by               goes
    ---------------------------------------  -------------------  -----------------------  ---------------------------
    schema                                   a number: SCHEMA     the first daemon         never
    nodes/<node>                             NodeRecord           the node's daemon        with its lease, seconds
                                                                                           after the daemon
    hosts/<host>/gpus/<uuid>                 Holder               the operation that       when its holder releases it
                                                                  claims the card
    hosts/<host>/ports/<protocol>/<port>     Holder               likewise, for a port     likewise
    containers/<name>                        Container (head)     operations, and what     with the container
                                                                  was observed
    revisions/containers/<uid>/<number>      ContainerRevision    the operation that       with the container
                                                                  commits it               or when it is pruned
    snapshots/containers/<uid>/<number>      Snapshot of that     the operation that       with the revision
                                             revision's files     replaces the revision
    volumes/<name>                           Volume (head)        operations               with the volume
    revisions/volumes/<uid>/<number>         VolumeRevision       the operation that       with the volume
                                                                  commits it
    operations/<id>                          Operation without    the saga, every step     with a lease, once it ended,
                                             what the next two                             or when there are too many
                                             keys hold
    arguments/<id>                           OperationArguments   the transaction that     in the transaction that
                                                                  begins the operation     ends the operation
    results/<id>/<size>                      OperationResult      the transaction that     with a lease, or when newer
                                                                  commits the operation    ones need the room
    locks/<kind>s/<name>                     the operation's id,  the transaction that     in the transaction that
                                             bare                 begins the operation     ends the operation
    requests/<request_id>                    RequestRecord        likewise                 with a lease, once the
                                                                                           operation ended
    images/<node>/<image id>                 ImageOrigin          the operation that       when the engine no longer
                                                                  commits or pulls it      has the image
    idle/<kind>s                             nothing              a daemon whose watch of  never
                                                                  the kind hears nothing
    idle/keeper                              nothing              a daemon that has        never
                                                                  compacted its own etcd

- A claim is keyed by host and not by node: two daemons on one host, whatever their nodes are called, can never hand
  out one card twice. It exists or it does not; every claim is made on the condition that it does not.
- A revision's number has ten digits, so that the order of keys is the order of revisions. History is made of keys of
  its own and never of etcd's revisions, which compaction erases.
- An operation's record is written at every step. What is large and does not change, a spec as a rule, is therefore
  kept beside it and written once. A result's key says how large its value is (bytes, ten digits), so that those that
  take too much together are found without reading them. An operation of schema 2 holds both itself; what continues it
  writes it in the new form.
- A lock's value is bare because it is compared as it stands: a daemon with a newer schema must be able to release
  what an older one locked.
- A lock is on a name; an operation that works on several objects holds one on each.
- A watch sees heads, locks and the idle key of a kind by one range of etcd's that spans all three, with what lies
  between: only then do they come in the order in which they happened. That of volumes spans the heads of containers as
  well, which say what they mount. What is put at the idle key is heard by every watch of the kind and tells each how
  far it has come. (etcd's own progress requests overtake events before 3.5.8.)
- The version that callers compare and set against is the mod_revision of the key; 0 is "there is none".
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from gpudock_server.model.claims import ClaimKey, GpuKey, PortKey
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol

# Raised when an older daemon could no longer read, or would damage, what a newer one writes.
SCHEMA = 3

DEFAULT_PREFIX = "/gpudock/v1/"


@dataclass(frozen=True, slots=True)
class KeyRange:
    """All keys from `start` up to, and without, `end`."""

    start: bytes
    end: bytes

    def after(self, key: bytes) -> KeyRange:
        """What comes behind `key`."""
        return KeyRange(key + b"\0", self.end)

    def holds(self, key: bytes) -> bool:
        """Whether `key` lies in it."""
        return self.start <= key < self.end

    def rest(self, key: bytes) -> bytes:
        """What tells `key` from the others in it; the same for an object's head and its lock."""
        return key.removeprefix(self.start)


@dataclass(frozen=True, slots=True)
class WatchKeys:
    """What a watch of one kind of object looks at. `referring`: heads of another kind, which name these."""

    heads: KeyRange
    locks: KeyRange
    idle: bytes
    referring: KeyRange | None = None

    @property
    def span(self) -> KeyRange:
        """The one range that has all of it, and other things."""
        ranges = [self.heads, self.locks, *([self.referring] if self.referring else [])]
        starts, ends = [one.start for one in ranges], [one.end for one in ranges]
        return KeyRange(min(*starts, self.idle), max(*ends, self.idle + b"\0"))


class Keys:
    """Builds keys below `prefix`, which begins and ends with a slash."""

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        if not (prefix.startswith("/") and prefix.endswith("/") and prefix.isascii()):
            raise ValueError(f"the prefix {prefix!r} must be ASCII and begin and end with a slash")
        self._prefix = prefix

    def schema(self) -> bytes:
        """The number of the schema that everything here is written in."""
        return self._key("schema")

    def node(self, node: str) -> bytes:
        """The daemon of a node."""
        return self._key("nodes", node)

    def nodes(self) -> KeyRange:
        """Every daemon."""
        return self._below("nodes")

    def claim(self, host: str, key: ClaimKey) -> bytes:
        """A card or a port of a host."""
        match key:
            case GpuKey(uuid):
                return self._key("hosts", host, "gpus", uuid)
            case PortKey(protocol, port):
                return self._key("hosts", host, "ports", protocol.value, str(port))

    def claims(self, host: str) -> KeyRange:
        """Everything that is claimed on a host."""
        return self._below("hosts", host)

    def claim_of(self, host: str, key: bytes) -> ClaimKey:
        """The claim that a key of `claims(host)` is."""
        match [unquote(part) for part in key.removeprefix(self.claims(host).start).decode("ascii").split("/")]:
            case ["gpus", uuid]:
                return GpuKey(uuid)
            case ["ports", protocol, port]:
                return PortKey(Protocol(protocol), int(port))
        raise ValueError(f"{key!r} is no claim")

    @staticmethod
    def last_segment(key: bytes) -> str:
        """What the last part of a key says: a name, an id, a number."""
        return unquote(key.decode("ascii", errors="replace").rpartition("/")[2])

    def container(self, name: str) -> bytes:
        """A container's head."""
        return self._key("containers", name)

    def containers(self) -> KeyRange:
        """Every head, in the order of their names."""
        return self._below("containers")

    def lock(self, kind: ResourceKind, name: str) -> bytes:
        """Which operation has an object, or a name that is to become one."""
        return self._key("locks", f"{kind.value}s", name)

    def locks(self, kind: ResourceKind) -> KeyRange:
        """Every lock on objects of a kind, in the order of their names."""
        return self._below("locks", f"{kind.value}s")

    def all_locks(self) -> KeyRange:
        """Every lock there is."""
        return self._below("locks")

    def watched(self, kind: ResourceKind, heads: KeyRange, referring: KeyRange | None = None) -> WatchKeys:
        """What a watch of the objects of a kind looks at."""
        return WatchKeys(heads, self.locks(kind), self._key("idle", f"{kind.value}s"), referring)

    def lock_of(self, key: bytes) -> tuple[ResourceKind, str] | None:
        """What a key of `all_locks` locks; None where that is of a kind that this version does not know."""
        kind, _, name = key.removeprefix(self.all_locks().start).decode("ascii").partition("/")
        known = {f"{one.value}s": one for one in ResourceKind}
        return (known[kind], unquote(name)) if kind in known else None

    def container_revision(self, uid: str, number: int) -> bytes:
        """One revision of a container."""
        return self._key("revisions", "containers", uid, f"{number:010d}")

    def container_revisions(self, uid: str) -> KeyRange:
        """All revisions of a container, oldest first."""
        return self._below("revisions", "containers", uid)

    def container_snapshot(self, uid: str, number: int) -> bytes:
        """What is known of the files that were kept of a revision."""
        return self._key("snapshots", "containers", uid, f"{number:010d}")

    def container_snapshots(self, uid: str) -> KeyRange:
        """All snapshots of a container, oldest first."""
        return self._below("snapshots", "containers", uid)

    def volume(self, name: str) -> bytes:
        """A volume's head."""
        return self._key("volumes", name)

    def volumes(self) -> KeyRange:
        """Every volume's head, in the order of their names."""
        return self._below("volumes")

    def volume_revision(self, uid: str, number: int) -> bytes:
        """One revision of a volume."""
        return self._key("revisions", "volumes", uid, f"{number:010d}")

    def volume_revisions(self, uid: str) -> KeyRange:
        """All revisions of a volume, oldest first."""
        return self._below("revisions", "volumes", uid)

    def operation(self, operation_id: str) -> bytes:
        """An operation."""
        return self._key("operations", operation_id)

    def operations(self) -> KeyRange:
        """Every operation, in the order of their ids."""
        return self._below("operations")

    def arguments(self, operation_id: str) -> bytes:
        """What an operation was begun with."""
        return self._key("arguments", operation_id)

    def result(self, operation_id: str, size: int) -> bytes:
        """What an operation left, in so many bytes."""
        return self._key("results", operation_id, f"{size:010d}")

    def results_of(self, operation_id: str) -> KeyRange:
        """What one operation left, whatever its size."""
        return self._below("results", operation_id)

    def results(self) -> KeyRange:
        """What all operations left, in the order of their ids: the newest first."""
        return self._below("results")

    def maintenance_marker(self) -> bytes:
        """What is put where etcd is to take notice of what it has freed; empty."""
        return self._key("idle", "keeper")

    def request(self, request_id: str) -> bytes:
        """What a caller's request id stood for."""
        return self._key("requests", request_id)

    def image_origin(self, node: str, image_id: str) -> bytes:
        """Where an image of a node's engine came from."""
        return self._key("images", node, image_id)

    def image_origins(self, node: str) -> KeyRange:
        """The origins of all images of a node's engine."""
        return self._below("images", node)

    def _key(self, *parts: str) -> bytes:
        # What is not UTF-8 comes from a value that somebody else wrote, and is looked for all the same.
        quoted = (quote(part, safe="", errors="surrogateescape") for part in parts)
        return (self._prefix + "/".join(quoted)).encode("ascii")

    def _below(self, *parts: str) -> KeyRange:
        start = self._key(*parts)
        # "0" is what follows "/": the range is all that continues with a slash.
        return KeyRange(start + b"/", start + b"0")
