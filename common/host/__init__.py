"""What every daemon is: a state directory, a machine, events, HostService, a gRPC server."""
