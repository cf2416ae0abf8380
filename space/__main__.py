"""Serve the Space locally, to look inside a model in a browser.

    vitp space
    vitp space outputs/my_run
    vitp space my_detector outputs/my_run/backbone my-org/another --port 7861

MODEL is a folder or Hub id of a full model, a backbone, or a model for segmentation, change detection, detection or
classification. The page opens with the first MODEL; the others can be selected in the page. Without MODEL, the page
opens with the model of the quickstart.
"""

import argparse
import socket
import sys
from pathlib import Path
from typing import Annotated

from modeling_vitp.command import errors
from modeling_vitp.command.paths import check_paths
from modeling_vitp.command.settings import Interval, option_type


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vitp space",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="*", metavar="MODEL", help="Folders or Hub ids. The page opens with the first.")
    parser.add_argument("--host", default="127.0.0.1", help="Address; 0.0.0.0 accepts other machines (%(default)s).")
    port = option_type(Annotated[int, Interval("[1, 65535]")])
    parser.add_argument("--port", type=port, help="Port. Default: the first free one from 7860.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code of these models' repositories.")
    args = errors.parse_arguments(parser, argv)
    check_paths([args])
    try:
        socket.getaddrinfo(args.host, None)
    except OSError as error:  # gradio would try for minutes
        raise errors.WrongArguments(f"--host {args.host}: {error.strerror}.") from error

    sys.path.insert(0, str(Path(__file__).parent))
    from app import serve
    from computing import limit_memory
    from loading import Models

    limit_memory()
    models = Models(
        model=args.model[0] if args.model else None,
        backbones=args.model[1:],
        trust_remote_code=args.trust_remote_code,
    )
    serve(models, server_name=args.host, server_port=args.port)
    return 0


if __name__ == "__main__":
    errors.run_program(main)
