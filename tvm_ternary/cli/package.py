"""``tvm-ternary package``: a folder with a model and all that it needs to run."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from tvm_ternary.cli.options import add_json, add_verb, print_json

_DESCRIPTION = """\
Make a folder with a compiled model and everything that its target needs beside NVIDIA's driver: the runtime libraries,
a C++ runner with its source, a Python one, and how to use both. It runs where nothing is installed but libstdc++, or
Python with numpy.
"""
_EXAMPLES = """\
  tvm-ternary package model.so -o model-package
  tvm-ternary package model.so -o model-package --force
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "package", "put a compiled model and its runtime in a folder", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("library", metavar="SO", help="a .so made by 'tvm-ternary compile'")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="the folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier package")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the folder and print what is in it."""
    from tvm_ternary.build.package import package

    made = package(args.library, args.output, args.force)
    if args.json:
        print_json({**asdict(made), "folder": str(made.folder)})
        return 0
    from tvm_ternary.analysis.report import Table, format_bytes
    from tvm_ternary.cli.tables import print_tables

    rows = [(part.name, str(part.files), format_bytes(part.bytes)) for part in made.parts]
    files = str(sum(part.files for part in made.parts))
    rows += [
        ("all", files, format_bytes(made.bytes)),
        ("without weights", "", format_bytes(made.bytes_without_weights)),
    ]
    runner = "./runner" if made.runner else "not built, for want of a C++ compiler; README.txt has the command"
    facts = Table(("", ""), (("folder", str(made.folder)), ("C++ runner", runner), ("Python", "python3 run.py")))
    print_tables([Table(("part", "files", "size"), tuple(rows), frozenset({1, 2})), facts])
    return 0
