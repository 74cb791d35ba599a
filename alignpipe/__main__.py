"""`python -m alignpipe`: the same as the `alignpipe` command."""

from alignpipe.cli import main

if __name__ == "__main__":
    main()
