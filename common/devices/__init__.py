"""The emulated devices; each runs in a process of its own (python -m common.devices)."""
