"""`python -m saeopt COMMAND` is the installed `saeopt COMMAND`."""

from saeopt.cli import main

if __name__ == "__main__":
    main()
