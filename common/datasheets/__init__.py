"""What a device's manual tells the author of its driver: registers, rings, contents."""
