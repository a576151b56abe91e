"""What both hosts need; imports neither source nor destination."""

import os

# gRPC's core would write lines of its own to standard error, before the one that we say. It looks when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# numpy's linear algebra, of which nothing is used, would start a thread for each core, at a third of the import's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
