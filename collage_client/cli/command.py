"""The command `collage`: from the process' arguments to its exit code.

Exit codes: 0 done, 1 failed, 2 bad input (the field is named), 130 interrupted (the job is cancelled).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from collage_client import CollageError, InvalidInput
from collage_client.cli import arguments, report
from collage_client.cli.output import Output

_BAD_INPUT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; `argv` defaults to the process' arguments. Returns the exit code."""
    args = arguments.parser().parse_args(argv)
    args.output = output = Output(is_json=args.json, is_quiet=args.quiet)
    try:
        code: int | None = asyncio.run(args.action(args))
    except KeyboardInterrupt:
        output.fail("collage: interrupted", {"reason": "INTERRUPTED", "message": "interrupted"})
        return 130
    except CollageError as problem:
        is_input = isinstance(problem, InvalidInput) or problem.code in _BAD_INPUT
        path = getattr(args, "path", None) or getattr(args, "folder", None)
        text = report.error(problem, is_input=is_input, collage_path=path)
        output.fail(text, report.error_tree(problem))
        return 2 if is_input else 1
    except OSError as problem:
        output.fail(f"collage: {problem}", {"reason": "OS_ERROR", "message": str(problem)})
        return 1
    return code or 0
