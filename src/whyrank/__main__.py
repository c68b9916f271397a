"""`python -m whyrank`: the same as the command, for launchers that start modules."""

from whyrank.cli import main

if __name__ == "__main__":
    main()
