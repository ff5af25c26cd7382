"""Keeps the records and the engine in agreement: at events of the engine, and in periodic full passes.

A difference is drift (`model.drift`). It is repaired by a rule or reported. An engine or a store that does not answer
changes nothing. A container with an operation is left to that operation. docs/reconcile.md has the rules; `loop` runs
them, `drift` keeps what was found, `records` reads the records, and the others have the rules:

    locks             stale locks, and operations without their locks
    orphans           what to do with an engine container that no record binds; `adoption` does it
    overtaken         unfinished operations of a restored store that newer work has overtaken
    containers        a container and its engine container: status, name, limits, claims
    restarts          containers whose start failed
    claims            stale claims, and missing ones
    volumes           volumes without a record
    revision_backups  histories, and containers of which only the history is left
    host_paths        bindings of host paths
    images            unused images
"""

from gpudock_server.core.reconcile.drift import DriftTracker
from gpudock_server.core.reconcile.loop import Reconciler

__all__ = ["DriftTracker", "Reconciler"]
