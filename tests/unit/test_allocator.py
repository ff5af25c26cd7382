"""Which cards and ports are proposed."""

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


def held(by: dict[int, str]) -> ClaimTable:
    claims: dict[ClaimKey, Holder] = {
        GpuKey(f"GPU-{index}"): Holder(container=uid, uid=uid, node="n") for index, uid in by.items()
    }
    return ClaimTable(claims)


def wanted(
    count: int = 0, had: tuple[int, ...] = (), has: tuple[int, ...] = (), **request: object
) -> AllocationRequest:
    return AllocationRequest(
        uid=MINE,
        gpus=GpuRequest(count=count).model_copy(update=request),
        ports=(),
        current=Placement(gpu_uuids=tuple(f"GPU-{index}" for index in has)),
        previous=Placement(gpu_uuids=tuple(f"GPU-{index}" for index in had)),
    )


EIGHT = [gpu(index) for index in range(8)]


def chosen(table: ClaimTable, asked: AllocationRequest, gpus: list[Gpu] | None = None) -> list[int]:
    return [int(uuid.removeprefix("GPU-")) for uuid in choose_gpus(gpus or EIGHT, table, asked)]


def test_keeps_what_it_holds_in_its_order() -> None:
    table = held({5: MINE, 2: MINE, 0: "other"})
    assert chosen(table, wanted(4, has=(5, 2))) == [5, 2, 1, 3]
    assert chosen(table, wanted(1, has=(5, 2))) == [5]


def test_gets_back_what_it_had_where_it_is_free() -> None:
    assert chosen(held({6: "other"}), wanted(2, had=(6, 7))) == [7, 0]


def test_says_how_many_are_free() -> None:
    sick = [*EIGHT[:6], gpu(6, health=GpuHealth.LOST, health_message="XID 79"), gpu(7, mig_mode=MigMode.ENABLED)]
    with pytest.raises(GpuExhausted) as refused:
        chosen(held({0: "other"}), wanted(6), sick)
    assert refused.value.metadata == {
        "requested": "6",
        "free": "5",
        "matching": "5",
        "total": "8",
        "unhealthy": "GPU-6 (XID 79),GPU-7 (MIG mode is enabled; gpudock allocates whole GPUs)",
    }
    assert "GPU-6 (XID 79)" in refused.value.message
    assert "GPU-7 (MIG mode is enabled" in refused.value.message


def test_says_how_many_of_the_free_ones_match_and_counts_those_that_it_holds() -> None:
    mixed = [*(gpu(index, name="Tesla T4") for index in range(3)), *EIGHT[3:]]
    with pytest.raises(GpuExhausted) as refused:
        chosen(held({0: MINE, 1: "other"}), wanted(3, has=(0,), model="t4"), mixed)
    numbers = refused.value.metadata
    assert (numbers["requested"], numbers["matching"], numbers["free"], numbers["total"]) == ("3", "2", "6", "8")
    assert refused.value.unhealthy == ()


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (gpu(0), ""),
        (gpu(0, health=GpuHealth.LOST), "LOST"),
        (gpu(0, health=GpuHealth.UNHEALTHY, health_message="XID 48"), "XID 48"),
        (gpu(0, mig_mode=MigMode.DISABLED), ""),
        (gpu(0, mig_mode=MigMode.ENABLED), "MIG mode is enabled; gpudock allocates whole GPUs"),
    ],
)
def test_says_why_a_card_is_not_handed_out(card: Gpu, why: str) -> None:
    assert unavailable_reason(card) == why


def test_a_card_that_became_unhealthy_is_replaced() -> None:
    sick = [gpu(0, health=GpuHealth.UNHEALTHY, health_message="XID 48"), *EIGHT[1:]]
    assert chosen(held({0: MINE, 1: MINE}), wanted(2, has=(0, 1)), sick) == [1, 2]


def test_model_and_memory_narrow() -> None:
    mixed = [gpu(0, name="Tesla T4", memory_total_bytes=16 << 30), *EIGHT[1:]]
    assert chosen(held({}), wanted(1, model="t4"), mixed) == [0]
    assert chosen(held({}), wanted(1, min_memory_bytes=40 << 30), mixed) == [1]
    # A card's total is enough for a request of just that, and one byte more is not.
    assert chosen(held({}), wanted(1, min_memory_bytes=16 << 30), mixed) == [0]
    assert chosen(held({}), wanted(1, min_memory_bytes=(16 << 30) + 1), mixed) == [1]
    with pytest.raises(GpuExhausted):
        chosen(held({}), wanted(2, model="t4"), mixed)


def test_pins() -> None:
    table = held({3: "other"})
    assert chosen(table, wanted(uuids=("GPU-4", "GPU-1"))) == [4, 1]
    # What it holds itself may be pinned.
    assert chosen(held({3: MINE}), wanted(uuids=("GPU-3",))) == [3]


def test_a_pinned_card_that_another_holds_says_who() -> None:
    table = ClaimTable({GpuKey("GPU-3"): Holder(container="train", uid="other", node="n")})
    with pytest.raises(GpuBusy) as busy:
        chosen(table, wanted(uuids=("GPU-4", "GPU-3")))
    assert busy.value.metadata == {"uuid": "GPU-3", "container": "train"}


def test_pinned_cards_that_do_not_exist_are_named_beside_those_that_do() -> None:
    with pytest.raises(GpuNotFound) as unknown:
        chosen(held({}), wanted(uuids=("GPU-9", "GPU-1", "GPU-8")), EIGHT[:2])
    assert unknown.value.metadata == {"uuids": "GPU-9,GPU-8", "available": "GPU-0,GPU-1"}


def test_a_pinned_card_of_another_model_is_not_found_beside_those_of_that_model() -> None:
    mixed = [*EIGHT[:2], gpu(2, name="Tesla T4"), gpu(3, name="Tesla T4")]
    with pytest.raises(GpuNotFound) as unknown:
        chosen(held({}), wanted(uuids=("GPU-2", "GPU-0"), model="T4"), mixed)
    assert unknown.value.metadata == {"uuids": "GPU-0", "available": "GPU-2,GPU-3"}
    assert chosen(held({}), wanted(uuids=("GPU-3",), model="T4"), mixed) == [3]


def test_a_pinned_card_that_is_unhealthy_says_what_is_wrong() -> None:
    sick = [gpu(0, health=GpuHealth.LOST, health_message="fell off the bus"), *EIGHT[1:]]
    with pytest.raises(GpuUnhealthy) as refused:
        chosen(held({}), wanted(uuids=("GPU-0",)), sick)
    assert refused.value.metadata == {"uuid": "GPU-0", "health": "LOST", "detail": "fell off the bus"}


@given(
    st.dictionaries(st.integers(0, 7), st.sampled_from([MINE, "other"])),
    st.integers(1, 8),
    st.sets(st.integers(0, 7)),
)
def test_never_what_another_holds_nor_one_twice(by: dict[int, str], count: int, lost: set[int]) -> None:
    table = held(by)
    gpus = [gpu(index, health=GpuHealth.LOST if index in lost else GpuHealth.HEALTHY) for index in range(8)]
    has = tuple(index for index, uid in by.items() if uid == MINE)
    available = [index for index in range(8) if index not in lost and by.get(index, MINE) == MINE]
    if len(available) < count:
        with pytest.raises(GpuExhausted):
            chosen(table, wanted(count, has=has), gpus)
        return
    picked = chosen(table, wanted(count, has=has), gpus)
    assert len(set(picked)) == count
    assert set(picked) <= set(available)
    kept = [index for index in has if index not in lost]
    assert set(picked) >= set(kept[:count]), "what it holds comes first"
