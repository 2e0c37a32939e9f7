"""The command line: `fastlm COMMAND`. Each command lives in the module of its name and imports what is heavy late."""

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
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"fastlm: {error}", file=sys.stderr)
        sys.exit(2)


def _is_ours(error):
    """Whether an error is a message to the user: not a failure inside a library such as torch."""
    return not isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in ("builtins", "fastlm")
