"""The vCPU process (python -m common.guest) and the guest programs that it runs."""
