"""Opens the Space here: looks inside of a model in a browser.

    vitp space
    vitp space outputs/my_run
    vitp space my_detector outputs/my_run/backbone my-org/another --port 7861

MODEL is a folder or Hub id of any kind: a whole model, a backbone, a segmentation, a change detector, a detector, a
classifier. The page begins with the first one, and the others are there to choose from; without any it is the
quickstart's.
"""

import argparse
import sys
from pathlib import Path

from modeling_vitp.command import errors
from modeling_vitp.command.paths import check_paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vitp space", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*", metavar="MODEL", help="folders or Hub ids; the page begins with the first")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on, if not given")
    parser.add_argument("--trust_remote_code", action="store_true", help="lets these models run code of their repos")
    parser.error = errors.refuse
    args = parser.parse_args(argv)
    check_paths([args])

    sys.path.insert(0, str(Path(__file__).parent))
    from app import build_app, launch_options
    from loading import Models

    models = Models(args.model[0] if args.model else None, args.model[1:], args.trust_remote_code)
    build_app(models).launch(server_name=args.host, server_port=args.port, **launch_options())
    return 0


if __name__ == "__main__":
    errors.run_program(main)
