"""``python -m lape_fast`` is the command ``lape-fast``."""

from lape_fast.cli import main

if __name__ == "__main__":
    main()
