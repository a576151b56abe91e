"""The VFIO uAPI over a unix socket: codec, client, server."""
