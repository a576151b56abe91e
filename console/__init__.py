"""The operator: command line, host (both roles), demo, progress, report."""

import common  # noqa: F401  # before anything imports grpc
