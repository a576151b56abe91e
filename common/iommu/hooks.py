"""Points at which a test can stop or observe a container.

They do nothing, and cost a call each; a test that drives real processes can hold some of them (`common.hooks`).
"""

from __future__ import annotations

from common.hooks import reach
from common.iommu.iova_tree import Mapping
from common.vfio.feature import Range

__all__ = ["NO_HOOKS", "Hooks"]


class Hooks:
    """Override what a test wants to know; everything runs on the thread that does the work."""

    def reported(self, window: Range) -> None:  # noqa: ARG002 - for those who override it
        """Every device has answered the REPORT of a window; nothing is translated yet."""
        reach("container.reported")

    def window_done(self, window: Range) -> None:
        """A window is collected; map and unmap may run before the next one."""

    def unmapped(self, mapping: Mapping) -> None:
        """Every device has answered the unmap; nothing is marked yet."""

    def disarmed(self) -> None:
        """Every log is stopped in order to be armed again."""
        reach("container.disarmed")

    def rearmed(self) -> None:
        """Every log is armed again; what was mapped meanwhile is not marked yet."""


NO_HOOKS = Hooks()
