"""The machine process (python -m common.machine): all that must outlive a daemon, and the client that drives it."""

SOCKET = "machine.sock"  # in the machine's directory: where it is asked
# Of the requests of a migration; it grows when they change, for a machine may be older than the daemon that asks.
REQUESTS = 2
