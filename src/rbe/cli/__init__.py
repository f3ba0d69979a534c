"""The command line: `rbe compress`, `inspect`, `verify`, `eval`, `decompress`, `report`, `profile` and others."""

import io
import json
import os
import signal
import sys
from types import FrameType

# What command lines end with that cannot be understood.
_USAGE = 2


def main() -> None:
    """Entry point of the `rbe` command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job may ignore interrupts
        signal.signal(signal.SIGINT, _interrupted)
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


def _interrupted(number: int, frame: FrameType | None) -> None:
    """End at once while a module is imported: half imported, many fail in ways of their own or go on."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            if "--json" in sys.argv:
                print(json.dumps({"error": "interrupted"}), flush=True)
            print("rbe: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        outer = outer.f_back
    signal.default_int_handler(number, frame)
