from __future__ import annotations

from common.machine.state_changes import KEPT, StateChanges
from common.vfio.migration import DeviceState


def test_what_has_changed_since() -> None:
    changes = StateChanges()
    changes.note("nic0", DeviceState.STOP)
    last, none = changes.after(None, 0)
    assert (last, none) == (1, [])
    changes.note("nic1", DeviceState.RUNNING)
    assert changes.after(last, 60) == (2, [("nic1", "RUNNING")])
    assert changes.after(0, 60) == (2, [("nic0", "STOP"), ("nic1", "RUNNING")])
    assert changes.after(2, 0) == (2, [])


def test_only_the_newest_are_kept() -> None:
    changes = StateChanges()
    for _ in range(KEPT + 1):
        changes.note("nic0", DeviceState.STOP)
    last, kept = changes.after(0, 0)
    assert (last, len(kept)) == (KEPT + 1, KEPT)
