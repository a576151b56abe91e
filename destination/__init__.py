"""The incoming story: a machine arrives at this host."""

import common  # noqa: F401  # before anything imports grpc
