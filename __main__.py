"""`python -m glassine` is the `glassine` command."""

from glassine.cli import main

if __name__ == "__main__":
    main()
