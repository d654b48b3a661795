"""python -m khoctl."""

from khoctl.app import main

main()
