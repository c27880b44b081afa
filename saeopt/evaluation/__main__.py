"""`python -m saeopt.evaluation RUN_DIR` is `saeopt evaluate RUN_DIR`."""

from saeopt.evaluator import main

if __name__ == "__main__":
    main()
