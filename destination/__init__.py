"""The incoming story: a machine arrives at this host."""
