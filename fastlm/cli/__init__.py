"""The command line: `fastlm COMMAND`. Each command lives in the module of its name and imports what is heavy late."""

import signal
import sys

import typer

from fastlm.cli import bench, check, convert, data, demo, doctor, explain, generate, profile, report, train, tune

app = typer.Typer(
    name="fastlm",
    help="GPT-2, trained and run fast. `fastlm demo` shows it in two minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("convert")(convert.convert)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.command("explain")(explain.explain)
app.command("tune")(tune.tune)
app.command("profile")(profile.profile)
app.command("report")(report.report)


def main():
    """Runs the command line; a wrong call or input, or what this machine cannot do, is one message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show ends no command
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup it is ignored
            signal.signal(number, _stop)
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"fastlm: {error}", file=sys.stderr)
        sys.exit(2)


def _stop(number, frame):
    """Ends a command as the signal would, but what is half made is cleared away; others do not cut that off."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _is_ours(error):
    """Whether an error is a message to the user: not a failure inside a library such as torch."""
    return not isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in ("builtins", "fastlm")
