"""Which GPUs are allocated."""

from __future__ import annotations

import pytest
from gpudock_server.core.placement.allocator import AllocationRequest, choose_gpus, unavailable_reason
from gpudock_server.errors import GpuBusy, GpuExhausted, GpuNotFound, GpuUnhealthy
from gpudock_server.model.claims import ClaimKey, ClaimTable, GpuKey, Holder
from gpudock_server.model.container import Placement
from gpudock_server.model.gpu import Gpu, GpuHealth, MigMode
from gpudock_server.model.spec import GpuRequest
from hypothesis import given
from hypothesis import strategies as st

MINE = "mine"


def gpu(index: int, **fields: object) -> Gpu:
    base = Gpu(uuid=f"GPU-{index}", index=index, name="NVIDIA A100-SXM4-80GB", memory_total_bytes=80 << 30)
    return base.model_copy(update=fields)


def claims_of(owners: dict[int, str]) -> ClaimTable:
    claims: dict[ClaimKey, Holder] = {
        GpuKey(f"GPU-{index}"): Holder(container=uid, uid=uid, node="n") for index, uid in owners.items()
    }
    return ClaimTable(claims)


def request(
    count: int = 0, had: tuple[int, ...] = (), has: tuple[int, ...] = (), **fields: object
) -> AllocationRequest:
    return AllocationRequest(
        uid=MINE,
        gpus=GpuRequest(count=count).model_copy(update=fields),
        ports=(),
        current=Placement(gpu_uuids=tuple(f"GPU-{index}" for index in has)),
        previous=Placement(gpu_uuids=tuple(f"GPU-{index}" for index in had)),
    )


EIGHT = [gpu(index) for index in range(8)]


def chosen(table: ClaimTable, allocation_request: AllocationRequest, gpus: list[Gpu] | None = None) -> list[int]:
    return [int(uuid.removeprefix("GPU-")) for uuid in choose_gpus(gpus or EIGHT, table, allocation_request)]


def test_held_gpus_are_kept_in_their_order() -> None:
    table = claims_of({5: MINE, 2: MINE, 0: "other"})
    assert chosen(table, request(4, has=(5, 2))) == [5, 2, 1, 3]
    assert chosen(table, request(1, has=(5, 2))) == [5]


def test_previous_gpus_are_allocated_again_if_they_are_free() -> None:
    assert chosen(claims_of({6: "other"}), request(2, had=(6, 7))) == [7, 0]


def test_an_exhausted_node_reports_its_free_and_unhealthy_gpus() -> None:
    sick = [*EIGHT[:6], gpu(6, health=GpuHealth.LOST, health_message="XID 79"), gpu(7, mig_mode=MigMode.ENABLED)]
    with pytest.raises(GpuExhausted) as refused:
        chosen(claims_of({0: "other"}), request(6), sick)
    assert refused.value.metadata == {
        "requested": "6",
        "free": "5",
        "matching": "5",
        "total": "8",
        "unhealthy": "GPU-6 (XID 79),GPU-7 (MIG mode is enabled; gpudock allocates whole GPUs)",
    }
    assert "GPU-6 (XID 79)" in refused.value.message
    assert "GPU-7 (MIG mode is enabled" in refused.value.message


def test_an_exhausted_node_counts_matching_gpus_with_those_that_the_container_holds() -> None:
    mixed = [*(gpu(index, name="Tesla T4") for index in range(3)), *EIGHT[3:]]
    with pytest.raises(GpuExhausted) as refused:
        chosen(claims_of({0: MINE, 1: "other"}), request(3, has=(0,), model="t4"), mixed)
    numbers = refused.value.metadata
    assert (numbers["requested"], numbers["matching"], numbers["free"], numbers["total"]) == ("3", "2", "6", "8")
    assert refused.value.unhealthy == ()


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (gpu(0), ""),
        (gpu(0, health=GpuHealth.LOST), "LOST"),
        (gpu(0, health=GpuHealth.UNHEALTHY, health_message="XID 48"), "XID 48"),
        (gpu(0, mig_mode=MigMode.DISABLED), ""),
        (gpu(0, mig_mode=MigMode.ENABLED), "MIG mode is enabled; gpudock allocates whole GPUs"),
    ],
)
def test_why_a_gpu_is_not_allocated(device: Gpu, reason: str) -> None:
    assert unavailable_reason(device) == reason


def test_a_gpu_that_became_unhealthy_is_replaced() -> None:
    sick = [gpu(0, health=GpuHealth.UNHEALTHY, health_message="XID 48"), *EIGHT[1:]]
    assert chosen(claims_of({0: MINE, 1: MINE}), request(2, has=(0, 1)), sick) == [1, 2]


def test_only_gpus_of_the_model_and_with_the_memory_are_allocated() -> None:
    mixed = [gpu(0, name="Tesla T4", memory_total_bytes=16 << 30), *EIGHT[1:]]
    assert chosen(claims_of({}), request(1, model="t4"), mixed) == [0]
    assert chosen(claims_of({}), request(1, min_memory_bytes=40 << 30), mixed) == [1]
    # The total memory of a GPU satisfies a request for exactly that, and not for one byte more.
    assert chosen(claims_of({}), request(1, min_memory_bytes=16 << 30), mixed) == [0]
    assert chosen(claims_of({}), request(1, min_memory_bytes=(16 << 30) + 1), mixed) == [1]
    with pytest.raises(GpuExhausted):
        chosen(claims_of({}), request(2, model="t4"), mixed)


def test_pinned_gpus_are_allocated_in_their_order() -> None:
    table = claims_of({3: "other"})
    assert chosen(table, request(uuids=("GPU-4", "GPU-1"))) == [4, 1]
    # A container can pin a GPU that it holds.
    assert chosen(claims_of({3: MINE}), request(uuids=("GPU-3",))) == [3]


def test_a_pinned_gpu_of_another_container_is_busy() -> None:
    table = ClaimTable({GpuKey("GPU-3"): Holder(container="train", uid="other", node="n")})
    with pytest.raises(GpuBusy) as busy:
        chosen(table, request(uuids=("GPU-4", "GPU-3")))
    assert busy.value.metadata == {"uuid": "GPU-3", "container": "train"}


def test_unknown_pinned_gpus_are_reported_with_the_existing_ones() -> None:
    with pytest.raises(GpuNotFound) as unknown:
        chosen(claims_of({}), request(uuids=("GPU-9", "GPU-1", "GPU-8")), EIGHT[:2])
    assert unknown.value.metadata == {"uuids": "GPU-9,GPU-8", "available": "GPU-0,GPU-1"}


def test_a_pinned_gpu_of_another_model_is_reported_with_the_gpus_of_the_model() -> None:
    mixed = [*EIGHT[:2], gpu(2, name="Tesla T4"), gpu(3, name="Tesla T4")]
    with pytest.raises(GpuNotFound) as unknown:
        chosen(claims_of({}), request(uuids=("GPU-2", "GPU-0"), model="T4"), mixed)
    assert unknown.value.metadata == {"uuids": "GPU-0", "available": "GPU-2,GPU-3"}
    assert chosen(claims_of({}), request(uuids=("GPU-3",), model="T4"), mixed) == [3]


def test_a_pinned_unhealthy_gpu_is_reported_with_its_health() -> None:
    sick = [gpu(0, health=GpuHealth.LOST, health_message="fell off the bus"), *EIGHT[1:]]
    with pytest.raises(GpuUnhealthy) as refused:
        chosen(claims_of({}), request(uuids=("GPU-0",)), sick)
    assert refused.value.metadata == {"uuid": "GPU-0", "health": "LOST", "detail": "fell off the bus"}


@given(
    st.dictionaries(st.integers(0, 7), st.sampled_from([MINE, "other"])),
    st.integers(1, 8),
    st.sets(st.integers(0, 7)),
)
def test_no_gpu_is_allocated_twice_or_taken_from_another_container(
    owners: dict[int, str], count: int, lost: set[int]
) -> None:
    table = claims_of(owners)
    gpus = [gpu(index, health=GpuHealth.LOST if index in lost else GpuHealth.HEALTHY) for index in range(8)]
    has = tuple(index for index, uid in owners.items() if uid == MINE)
    available = [index for index in range(8) if index not in lost and owners.get(index, MINE) == MINE]
    if len(available) < count:
        with pytest.raises(GpuExhausted):
            chosen(table, request(count, has=has), gpus)
        return
    picked = chosen(table, request(count, has=has), gpus)
    assert len(set(picked)) == count
    assert set(picked) <= set(available)
    kept = [index for index in has if index not in lost]
    assert set(picked) >= set(kept[:count]), "a held GPU was replaced"
