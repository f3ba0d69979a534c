"""The command line: `rbe compress`, `inspect`, `verify`, `eval`, `decompress`, `report`, `profile` and others."""

import io
import json
import sys

# What command lines end with that cannot be understood.
_USAGE = 2


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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as end:
        if end.code == _USAGE and "--json" in sys.argv:
            # The parser has said it on standard error already.
            said = getattr(end.__context__, "format_message", lambda: "wrong usage; see --help")()
            print(json.dumps({"error": said}))
        raise
