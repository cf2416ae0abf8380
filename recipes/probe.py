r"""Probe frozen features of backbones on classes, masks or boxes, and compare them with controls.

    vitp probe --backbones my_backbone facebook/dinov2-base --dataset_name folder_of_classes
    vitp probe --backbones my_backbone facebook/dinov2-base --data loveda \
        --data_root /datasets/LoveDA --test_split val

With `--shard 3/8`, one of eight processes or jobs only extracts its part of the features.

Images with classes are probed by nearest neighbors and a linear layer, images with masks or boxes by a linear layer on
the patches. The backbones are frozen.
"""

import vitp_command
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.training.command_line import load_plugins, parse


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(argv, __doc__, (ProbeArguments,))

    from modeling_vitp.tasks.probing import probe

    load_plugins(args.plugins)
    probe(args)
    return 0


if __name__ == "__main__":
    vitp_command.run(main)
