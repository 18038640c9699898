"""`python -m svdq_compile`, as torchrun starts it: the command line."""

from .cli import main

main()
