"""`python -m data_tools VERB ...`: each verb is a module, imported only when it is asked for."""

import argparse
import importlib
import sys

from data_tools.arguments import Parser, leave_stdout
from data_tools.errors import UsageError, UserError, disk_error

VERBS = {
    "pack": ("data_tools.pack.command", "a folder or table of images -> indexed WebDataset shards"),
    "index": ("data_tools.index", "write the index of tars made by other tools"),
    "verify": ("data_tools.verify.command", "check shards against their hashes, indexes and manifest"),
    "reshard": ("data_tools.rewrite.reshard_command", "cut shards anew, of all samples or of those chosen"),
    "split": ("data_tools.rewrite.split_command", "parts of a corpus, by shares or as its samples say"),
    "repair": ("data_tools.rewrite.repair_command", "new shards of what is whole in damaged ones"),
    "delete": ("data_tools.rewrite.delete_command", "take samples out of a packed folder, for good"),
    "rows": ("data_tools.rows", "what became of every input row of a pack"),
    "hash": ("data_tools.hashing.command", "hashes of every picture, as a column beside each shard"),
    "dedup": ("data_tools.dedup.command", "find copies and near-copies of pictures by the column of hashes"),
    "preview": ("data_tools.preview", "a contact sheet of images with captions, PNG or HTML"),
    "plan-stream": ("data_tools.plan_stream", "what training on shards will fetch, keep and shuffle"),
    "scenes": ("data_tools.scenes.command", "generate a captioned corpus of coloured shapes"),
}


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<11} {summary}" for verb, (_, summary) in VERBS.items())
    hint = "`python -m data_tools VERB --help` has options and examples."
    return f"usage: python -m data_tools VERB ...\n\n{verbs}\n\n{hint}"


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else UsageError.exit_code
    if argv[0] not in VERBS:
        raise UsageError(f"unknown verb {argv[0]!r}", expected=", ".join(VERBS))
    module_name, summary = VERBS[argv[0]]
    module = importlib.import_module(module_name)
    parser = Parser(
        f"python -m data_tools {argv[0]}",
        description=f"{argv[0]}: {summary}.",
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv[1:]))


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a fault is one line on stderr and the exit code: 1 failed, 2 usage."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, so that a reader that has gone is noticed here
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and leave_stdout():
            return 1
        refused = UserError(f"cannot use {error.filename or 'a file'}", got=error.strerror or error)
        print(f"error: {disk_error(error) or refused}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was committed stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
