"""``tvm-ternary inspect``: what an artifact says about itself."""

from __future__ import annotations

import argparse

from tvm_ternary.cli.options import add_json, add_verb, print_json

_DESCRIPTION = """\
Show what a compiled model says about itself: inputs and outputs, what became of every matrix, the CPU features that it
needs and whether this host has them, the GPUs it runs on, versions, sizes, checksums. The file is checked whole; none
of its code runs.
"""
_EXAMPLES = """\
  tvm-ternary inspect model.so
  tvm-ternary inspect model.so --functions
  tvm-ternary inspect model.so --json
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "inspect", "show what a compiled model holds and needs", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("library", metavar="SO", help="a .so made by 'tvm-ternary compile'")
    parser.add_argument(
        "--functions",
        action="store_true",
        help="also list every compiled function and its schedule, and what each GPU kernel takes",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the manifest and print it."""
    from tvm_ternary.runtime.artifact import read_artifact

    artifact = read_artifact(args.library)
    manifest = artifact.manifest
    missing = _missing_features(manifest.target.features, artifact.architecture)
    file_bytes = artifact.path.stat().st_size
    if args.json:
        document = {"path": str(artifact.path), "bytes": file_bytes, "missing_features": missing}
        print_json({**document, "manifest": manifest.to_dict()})
        return 0
    from tvm_ternary.analysis.device_report import device_table, kernels_table
    from tvm_ternary.analysis.report import attentions_tables, facts_table, functions_table, layers_table, specs_table
    from tvm_ternary.cli.tables import print_tables

    tables = [
        facts_table(manifest, file_bytes, missing),
        device_table(manifest),
        specs_table(manifest.inputs, manifest.outputs),
        layers_table(manifest.layers),
        *attentions_tables(manifest),
    ]
    if args.functions:
        tables += [functions_table(manifest), *([kernels_table(manifest)] if manifest.kernels else [])]
    print_tables(tables)
    return 0


def _missing_features(needed: tuple[str, ...], architecture: str) -> list[str] | None:
    """Give what this host lacks; None where its features cannot be read."""
    import platform

    from tvm_ternary.errors import HostError
    from tvm_ternary.target import host_features

    if platform.machine() != architecture:
        return [architecture]
    try:
        return sorted(set(needed) - host_features())
    except HostError:
        return None
