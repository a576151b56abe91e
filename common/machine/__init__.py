"""The machine process (python -m common.machine): all that must outlive a daemon, and the client that drives it."""

SOCKET = "machine.sock"  # in the machine's directory: where it is asked
