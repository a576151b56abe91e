"""gRPC as both daemons use it: servers, channels, errors, the hand-written page batch."""
