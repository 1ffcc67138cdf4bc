"""``python -m tuili``: the same as ``tuili``, for a source tree that is not installed."""

from tuili.cli import main

if __name__ == "__main__":
    main()
