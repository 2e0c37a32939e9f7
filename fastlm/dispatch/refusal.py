"""How a backend leaves a call undone: it refuses, with a sentence, or it fails, which is told in a line."""


class Refused(RuntimeError):
    """A sentence why a backend does not run a call: raised before any kernel is called, by the choice alone."""


def failure(error):
    """What an exception that is no refusal says in a line: its first, behind the name of its class.

    Triton's begin with a place in the source and a colon, and end with what is wrong there.
    """
    first, *rest = str(error).strip().splitlines() or [""]
    told = f"{first} {rest[-1]}" if rest and first.endswith(":") else first
    name = "" if type(error) is RuntimeError and told else type(error).__name__
    return ": ".join(part for part in (name, told[:200]) if part)
