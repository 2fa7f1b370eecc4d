"""``python -m d2kd`` is the command ``d2kd``."""

from d2kd.cli.main import main

if __name__ == "__main__":
    main()
