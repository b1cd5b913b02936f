"""`python -m vla0.cli`."""

from vla0.cli import main

main()
