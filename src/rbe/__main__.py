"""`python -m rbe` is the `rbe` command."""

from rbe.cli import main

if __name__ == "__main__":
    main()
