"""Requests over unix sockets between the processes of one host, with payloads and file descriptors."""
