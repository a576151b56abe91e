from __future__ import annotations

from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does: that is not what these tests are about.
settings.register_profile("switchover", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("switchover")
