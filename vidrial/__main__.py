"""`python -m vidrial`."""

from __future__ import annotations

from vidrial.cli.main import main

if __name__ == "__main__":
    main()
