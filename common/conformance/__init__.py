"""A conformance run for vfio-user devices: checks that hold a conversation with a server and judge what it answers."""
