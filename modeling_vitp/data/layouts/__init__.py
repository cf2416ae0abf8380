"""Layouts of labeled images, one class and one file each. A folder's layout is recognized in the reverse order."""
# ruff: noqa: I001

from .base import (
    LAYOUTS,
    ClassLayout,
    Layout,
    ObjectLayout,
    PairedLayout,
    layouts_about,
    layouts_of,
    recognize_layout,
    register_layout,
)
from .class_folders import ClassFolders
from .table import ClassTable
from .volumes import Volumes
from .changes import ChangePairs
from .masks import Masks
from .geojson import GeoJson
from .dota import Dota
from .yolo import Yolo
from .voc import PascalVOC
from .coco import Coco

__all__ = [
    "LAYOUTS",
    "ChangePairs",
    "ClassFolders",
    "ClassLayout",
    "ClassTable",
    "Coco",
    "Dota",
    "GeoJson",
    "Layout",
    "Masks",
    "ObjectLayout",
    "PairedLayout",
    "PascalVOC",
    "Volumes",
    "Yolo",
    "layouts_about",
    "layouts_of",
    "recognize_layout",
    "register_layout",
]
