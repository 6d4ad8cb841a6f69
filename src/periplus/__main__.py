"""`python -m periplus` is the command line."""

from periplus.cli import main

main()
