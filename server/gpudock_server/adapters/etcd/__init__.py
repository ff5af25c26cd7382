"""The state of an installation in etcd; keys.py describes its schema."""

from gpudock_server.adapters.etcd.client import EtcdAddress, EtcdTls
from gpudock_server.adapters.etcd.connection import EtcdConnection
from gpudock_server.adapters.etcd.embedded import EmbeddedEtcd
from gpudock_server.adapters.etcd.node_lease import NodeLease, NodeTaken
from gpudock_server.adapters.etcd.store import EtcdStore
from gpudock_server.adapters.host.process_identity import ProcessIdentity, identify, this_process

__all__ = [
    "EmbeddedEtcd",
    "EtcdAddress",
    "EtcdConnection",
    "EtcdStore",
    "EtcdTls",
    "NodeLease",
    "NodeTaken",
    "ProcessIdentity",
    "identify",
    "this_process",
]
