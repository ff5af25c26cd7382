"""Which cards and ports are proposed."""

from __future__ import annotations

import pytest
from gpudock_server.core.allocation import Wish, choose_gpus
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


def wish(count: int = 0, had: tuple[int, ...] = (), has: tuple[int, ...] = (), **request: object) -> Wish:
    return Wish(
        uid=MINE,
        gpus=GpuRequest(count=count).model_copy(update=request),
        ports=(),
        held=Placement(gpu_uuids=tuple(f"GPU-{index}" for index in has)),
        had=Placement(gpu_uuids=tuple(f"GPU-{index}" for index in had)),
    )


EIGHT = [gpu(index) for index in range(8)]


def chosen(table: ClaimTable, asked: Wish, gpus: list[Gpu] | None = None) -> list[int]:
    return [int(uuid.removeprefix("GPU-")) for uuid in choose_gpus(gpus or EIGHT, table, asked)]


def test_keeps_what_it_holds_in_its_order() -> None:
    table = held({5: MINE, 2: MINE, 0: "other"})
    assert chosen(table, wish(4, has=(5, 2))) == [5, 2, 1, 3]
    assert chosen(table, wish(1, has=(5, 2))) == [5]


def test_gets_back_what_it_had_where_it_is_free() -> None:
    assert chosen(held({6: "other"}), wish(2, had=(6, 7))) == [7, 0]


def test_says_how_many_are_free() -> None:
    sick = [*EIGHT[:6], gpu(6, health=GpuHealth.LOST, health_message="XID 79"), gpu(7, mig_mode=MigMode.ENABLED)]
    with pytest.raises(GpuExhausted) as refused:
        chosen(held({0: "other"}), wish(6), sick)
    assert refused.value.metadata["free"] == "5"
    assert "GPU-6 (XID 79)" in refused.value.message
    assert "GPU-7 (it is in MIG mode" in refused.value.message


def test_a_card_that_became_unhealthy_is_replaced() -> None:
    sick = [gpu(0, health=GpuHealth.UNHEALTHY, health_message="XID 48"), *EIGHT[1:]]
    assert chosen(held({0: MINE, 1: MINE}), wish(2, has=(0, 1)), sick) == [1, 2]


def test_model_and_memory_narrow() -> None:
    mixed = [gpu(0, name="Tesla T4", memory_total_bytes=16 << 30), *EIGHT[1:]]
    assert chosen(held({}), wish(1, model="t4"), mixed) == [0]
    assert chosen(held({}), wish(1, min_memory_bytes=40 << 30), mixed) == [1]
    with pytest.raises(GpuExhausted):
        chosen(held({}), wish(2, model="t4"), mixed)


def test_pins() -> None:
    table = held({3: "other"})
    assert chosen(table, wish(uuids=("GPU-4", "GPU-1"))) == [4, 1]
    with pytest.raises(GpuBusy) as busy:
        chosen(table, wish(uuids=("GPU-3",)))
    assert busy.value.container == "other"
    with pytest.raises(GpuNotFound) as unknown:
        chosen(table, wish(uuids=("GPU-9",)))
    assert "GPU-0" in unknown.value.metadata["available"]
    with pytest.raises(GpuUnhealthy):
        chosen(table, wish(uuids=("GPU-0",)), [gpu(0, health=GpuHealth.LOST), *EIGHT[1:]])


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
            chosen(table, wish(count, has=has), gpus)
        return
    picked = chosen(table, wish(count, has=has), gpus)
    assert len(set(picked)) == count
    assert set(picked) <= set(available)
    kept = [index for index in has if index not in lost]
    assert set(picked) >= set(kept[:count]), "what it holds comes first"
