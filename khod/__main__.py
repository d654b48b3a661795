"""python -m khod."""

from khod.daemon import main

main()
