"""What both hosts need; imports neither source nor destination."""
