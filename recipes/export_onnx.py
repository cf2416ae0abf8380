"""Export a backbone or a fine-tuned model as ONNX, for images of any size.

vitp export_onnx outputs/quickstart/backbone backbone.onnx
"""

import argparse

import vitp_command
from modeling_vitp.command.settings import NonNegativeFloat, option_type
from modeling_vitp.training.command_line import parse_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Folder or Hub id of an exported backbone or a fine-tuned model.")
    parser.add_argument("file", help="Output file, FILE.onnx, in an existing folder.")
    parser.add_argument(
        "--tolerance",
        type=option_type(NonNegativeFloat),
        default=1e-3,
        help="Largest allowed difference between outputs of model and graph, in standard deviations (%(default)s).",
    )
    args = parse_words(parser, argv)

    from modeling_vitp.convert.onnx import export_onnx

    print("Tracing the model and comparing it with the graph; for a detector this takes minutes.", flush=True)
    differences = export_onnx(args.checkpoint, args.file, args.tolerance)
    print("batch x height x width: largest difference, in standard deviations of the outputs")
    for size, difference in differences:
        print(f"{' x '.join(map(str, size))}: {difference:.1e}")
    print(f"The graph is in {args.file}")
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
