"""Drafts of operations on a model node, which must change nothing."""

from __future__ import annotations

import pytest
from gpudock_server.core.containers.commands import Command
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import GpudockError
from gpudock_server.model.operation import Operation, OperationState

from tests.unit.model_node import NODE, ModelNode


async def refusal(model: ModelNode, command: Command | volume_commands.Command) -> GpudockError:
    """The error with which a command is refused, which then must have changed nothing."""
    before = model.summary()
    with pytest.raises(GpudockError) as refused:
        await model.begin(command)
    assert model.summary() == before
    return refused.value


async def preview(model: ModelNode, command: Command | volume_commands.Command) -> Operation:
    """The operation that a command would begin. The preview must have changed nothing."""
    before = model.summary()
    if isinstance(command, volume_commands.Command):
        operation = await model.volumes.preview(command)
    else:
        operation = await model.containers.preview(command)
    assert model.summary() == before
    assert (operation.state, operation.node) == (OperationState.PLANNED, NODE)
    return operation
