"""What both hosts need; imports neither source nor destination."""

import os

# gRPC's core would write lines of its own to standard error, before the one that we say. It looks when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
