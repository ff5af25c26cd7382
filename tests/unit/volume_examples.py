"""Changes of the record of volume `data`, and its bytes in use."""

from __future__ import annotations

from gpudock_server.ports import Versioned

from tests.unit.model_node import ModelNode

# The bytes that each volume of the model has in use.
USED = 1 << 20


def change_record(model: ModelNode, **changes: object) -> None:
    """Change the record of volume `data`."""
    stored = model.store.volume_records["data"]
    model.store.volume_records["data"] = Versioned(stored.value.changed(**changes), stored.version)
