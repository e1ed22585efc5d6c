"""The program `llmopt`."""

import os
import signal
import sys


def main() -> int:
    """Run the command line of this process and give its exit code."""
    # A job that CI cancels is told to terminate: clean up as for Ctrl-C, so that no half-written folder stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # So does a terminal that is closed, unless the command was to outlive it (nohup).
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    # torch's threads wait for each other by spinning: where another program holds a core, that costs ten times as much.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from llmopt.cli.app import app
        from llmopt.cli.outcome import run
        from llmopt.cli.processes import let_the_first_speak

        code = run(app)
        let_the_first_speak(code)
        return code
    except KeyboardInterrupt:  # before there was a command to interrupt, or once more while it ended
        return 130


if __name__ == "__main__":
    sys.exit(main())
