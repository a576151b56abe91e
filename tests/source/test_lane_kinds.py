"""How long the batches of a lane of each kind are, by what both ends know."""

from __future__ import annotations

import pytest
from switchover.v1 import migration_pb2

from common.memory.compression import MAX_UNIT_PAGES
from common.memory.pages import MAX_PLAIN_PAGES
from common.rpc.versions import FEATURES, PLAIN_16M
from source.lane_kinds import batch_pages

GRPC, TCP = migration_pb2.LANE_KIND_GRPC, migration_pb2.LANE_KIND_TCP


@pytest.mark.parametrize("features", [FEATURES, FEATURES - {PLAIN_16M}, frozenset()])
def test_a_batch_is_no_longer_than_the_destination_takes(features: frozenset[str]) -> None:
    least, most = batch_pages(TCP, features)
    assert least <= most == (MAX_PLAIN_PAGES if PLAIN_16M in features else MAX_UNIT_PAGES)
    assert batch_pages(GRPC, features)[1] <= MAX_UNIT_PAGES
