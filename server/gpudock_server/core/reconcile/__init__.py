"""Keeps records and the engine in agreement: by the engine's events, and by a full pass now and then.

What is found is drift (`model.drift`). It is repaired by a rule or reported, never guessed at, and an engine or a store
that does not answer changes nothing. A container with an operation at work is left to that. docs/reconcile.md has the
rules; `drift` keeps what was found, `records` is what one pass sees, and the others each have a part of the rules:

    locks      locks without an operation, operations without their locks
    adoption   engine containers that no record binds: adopted, removed or reported
    containers one container against its engine container: status, name, limits, what it holds
    claims     claims that nobody has, and those that somebody lacks
"""

from gpudock_server.core.reconcile.drift import DriftTracker
from gpudock_server.core.reconcile.loop import Reconciler

__all__ = ["DriftTracker", "Reconciler"]
