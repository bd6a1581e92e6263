"""The `metaserve` command, and `python -m app` where no script of that name is at hand."""

import sys

from app.signals import be_ended_as_process_1


def main() -> int:
    """Run one command; its imports take half a second, in which signals count already."""
    be_ended_as_process_1()
    from app.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
