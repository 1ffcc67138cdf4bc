"""``python -m tuili.cli``: the same as ``tuili``."""

from tuili.cli import main

if __name__ == "__main__":
    main()
