"""Push a model, the bundle of an adaptation, a data set or the demo to the Hub.

    vitp push_to_hub outputs/my_run my-org/my-backbone --what backbone --dry_run
    vitp push_to_hub outputs/my_run my-org/my-model --what model --private
    vitp push_to_hub outputs/my_domain my-org/my-domain --what adaptation
    vitp push_to_hub outputs/my_run my-org/my-demo --what space

The files are listed first. Optimizer states, training arguments and training data are never pushed. Secrets, absolute
paths, and a license that differs from that of the initial weights are errors. All files are pushed in one commit. If
the command is interrupted, start it again to continue.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import vitp_command
from modeling_vitp.training.command_line import parse_words

if TYPE_CHECKING:
    from modeling_vitp.hub.upload import Contents

KINDS = ("backbone", "model", "adapter", "adaptation", "dataset", "space")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub id of a model, or folder of an adaptation or a data set.")
    parser.add_argument("repo_id", help="Hub id of the target, NAMESPACE/NAME.")
    parser.add_argument(
        "--what",
        choices=KINDS,
        required=True,
        help="Part to push. adapter: LoRA. adaptation: bundle of `vitp adapt`. space: demo of a model.",
    )
    parser.add_argument("--dry_run", action="store_true", help="List the files without pushing them.")
    parser.add_argument(
        "--private", action="store_true", help="Create a private repository. Public repositories are an error."
    )
    parser.add_argument("--revision", help="Branch, created if it does not exist (main).")
    parser.add_argument("--commit_message", help="Message of the commit, and title of the pull request.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of a commit to main.")
    parser.add_argument("--license", help="License, if the initial weights do not state one.")
    parser.add_argument("--base_model", help="Hub id of an adapter's base model that was loaded from a folder.")
    args = parse_words(parser, argv)
    if args.create_pr and args.revision not in (None, "main"):
        parser.error("--create_pr only supports main. Remove --revision.")
    if args.base_model and args.what != "adapter":
        parser.error(f"--base_model is for --what adapter, got --what {args.what}. Remove it.")
    if args.license and args.what == "space" and not Path(args.checkpoint).is_dir():
        parser.error(f"--license is for a model that is packed with the demo, not for {args.checkpoint}. Remove it.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)

    import httpx2
    from huggingface_hub import HfApi

    from modeling_vitp.command.errors import one_line
    from modeling_vitp.hub.failures import FAILURES, explain_failure
    from modeling_vitp.hub.upload import preview, push

    words = sys.argv[1:] if argv is None else argv
    again = shlex.join(["vitp", "push_to_hub", *words])
    api = HfApi()
    with tempfile.TemporaryDirectory() as work:
        try:
            contents = gather(args, Path(work))
            visibility, stale_files = preview(
                api,
                contents,
                args.repo_id,
                private=args.private,
                revision=args.revision,
                must_answer=not args.dry_run,
            )
            target = "a pull request" if args.create_pr else args.revision or "main"
            print(f"{args.what} -> {contents.repo_type} {args.repo_id}, {target}")
            print(f"visibility: {visibility}")
            print(contents.listing(stale_files))
            if args.dry_run:
                print("Nothing was sent (--dry_run).")
                return 0
            commit = push(
                api,
                contents,
                args.repo_id,
                private=True if args.private else None,
                revision=args.revision,
                commit_message=args.commit_message or f"Upload {args.what} with modeling-vitp",
                create_pr=args.create_pr,
            )
        except FAILURES as error:
            explanation = explain_failure(error, args.repo_id)
            hint = "Go"
            if args.create_pr and isinstance(error, httpx2.TransportError):
                # The answer may be lost after the Hub has opened the pull request.
                hint = f"If {args.repo_id} has no such pull request yet, go"
            return fail(f"{explanation}. {hint} on with: {again}")
        except KeyboardInterrupt:
            return fail(f"interrupted. Go on with: {again}")
        except (ValueError, OSError) as error:
            return fail(one_line(str(error)))
    print(commit.pr_url or commit.commit_url)
    return 0


def gather(args: argparse.Namespace, work_folder: Path) -> "Contents":
    """Return the files and the card to push. A backbone is first exported to a folder inside the work folder."""
    from modeling_vitp.hub.upload import gather_contents

    checkpoint = args.checkpoint
    run = None
    if args.what == "backbone":
        checkpoint, run = take_out_backbone(checkpoint, work_folder / "backbone")
    return gather_contents(
        args.what,
        checkpoint,
        args.repo_id,
        license=args.license,
        base_model=args.base_model,
        run=run,
    )


def take_out_backbone(checkpoint: str, folder: Path) -> tuple[str | Path, Path | None]:
    """Export the backbone of a model to `folder`; return the folder to push, and the folder of the run if known."""
    from modeling_vitp import convert_checkpoint, export_backbone
    from modeling_vitp.hub.files import check_no_secrets
    from modeling_vitp.hub.upload import local_folder, read_model_type

    source = local_folder(checkpoint)
    check_no_secrets(source)
    model_type = read_model_type(source)
    if model_type == "vitp":
        return export_backbone(source, folder), source
    if model_type == "internvl":
        return convert_checkpoint(source, folder, "backbone"), source
    return checkpoint, None


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    vitp_command.run(main)
