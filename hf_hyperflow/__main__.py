"""The command `hyperflow`, which is also `python -m hf_hyperflow`."""

from __future__ import annotations

import sys

from .extras import MissingExtraError, require_extra


def main() -> None:
    """Run the command line, or say in one line how to install what it needs."""
    try:
        with require_extra("cli", "the command line"):
            from .cli import main as run
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # the imports take seconds
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
