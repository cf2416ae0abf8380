"""ViTP in lmms-eval: the model, by its entry point, and benchmarks of remote sensing and medicine as tasks."""


def manifest():
    """What lmms-eval is told of the model `vitp`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vitp", chat_class_path=f"{__name__}.model.ViTP")
