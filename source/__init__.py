"""The outgoing story: a machine leaves this host."""

import common  # noqa: F401  # before anything imports grpc
