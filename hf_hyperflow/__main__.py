"""`python -m hf_hyperflow` is the command `hyperflow`."""

from .cli import main

if __name__ == "__main__":
    main()
