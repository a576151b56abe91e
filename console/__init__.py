"""The operator: command line, host (both roles), demo, progress, report."""
