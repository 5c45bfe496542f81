"""The command line. `nullspace COMMAND --help` says what each command does.

Exit codes
    0    done
    1    something failed; stderr says what, and the mend
    2    the command line itself is wrong
    3    no server answers
    4    not signed in, or not allowed
    5    no such thing
    6    the thing is in a state in which this cannot be done
    7    a field is wrong
    8    a limit or a quota
    9    the service, or its disk, is not able to
    10   the job did not complete: failed, paused or cancelled
    130  interrupted
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from nullspace.client import ClientError
from nullspace.commands import (
    evaluations,
    geometry,
    jobs,
    people,
    prompts,
    reproduce,
    service,
    trials,
)
from nullspace.download import DownloadFailed
from nullspace.guarded import StartFailed
from nullspace.terminal import out, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Nullspace removes the refusal behaviour of open-weight language models on shared GPUs.",
)
# typer brings a click of its own, or uses the one that is installed: its name depends on that
UsageError: Any = typer.BadParameter.__mro__[1]
for group in (service, jobs, evaluations, trials, geometry, prompts, people, reproduce):
    group.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(version("nullspace"), markup=False)
        raise typer.Exit


@app.callback()
def _begin(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options of the command line as a whole."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code (see the module)."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(args=arguments, standalone_mode=False)
    except UsageError as error:
        error.show()
        return 2
    except ClientError as error:
        say(str(error), "red")
        return error.exit_code
    except (StartFailed, DownloadFailed) as error:
        say(str(error), "red")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code if isinstance(code, int) else 0
