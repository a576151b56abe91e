"""`python -m console` is the command `switchover`, wherever that is installed."""

from __future__ import annotations

from console.cli import main

if __name__ == "__main__":
    main()
