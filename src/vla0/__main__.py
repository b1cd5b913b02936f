"""`python -m vla0` is `vla0`."""

from vla0.cli import main

main()
