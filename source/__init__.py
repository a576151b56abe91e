"""The outgoing story: a machine leaves this host."""
