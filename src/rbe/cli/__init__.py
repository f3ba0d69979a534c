"""The command line: `rbe compress`, `inspect`, `verify`, `eval`, `decompress`, `report`, `profile`, `generate`."""

import sys


def main() -> None:
    """Entry point of the `rbe` command."""
    try:
        from rbe.cli.app import app
    except ImportError as cause:
        if (cause.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        # Nothing but the standard library may be used to say this.
        print(f"rbe: the command line needs {cause.name}; install it with: pip install 'rbe[cli]'", file=sys.stderr)
        sys.exit(1)
    app()
