"""Objects of annotation files."""

from xml.etree import ElementTree

import pytest

from modeling_vitp.data.layouts.voc import voc_objects

CORNERS = [(10.0, 20.0), (30.0, 22.0), (29.0, 32.0), (9.0, 30.0)]


def test_dior_r_box_has_corners():
    names = ("left_top", "right_top", "right_bottom", "left_bottom")
    sides = "".join(f"<x_{name}>{x}</x_{name}><y_{name}>{y}</y_{name}>" for name, (x, y) in zip(names, CORNERS))
    document = f"<annotation><object><name>Dam</name><robndbox>{sides}</robndbox></object></annotation>"
    (found,) = voc_objects(ElementTree.fromstring(document), "00001.xml")
    assert found.corners == tuple(CORNERS) and found.box == (9, 20, 30, 32) and found.label == "Dam"
    broken = document.replace("<y_right_top>22.0</y_right_top>", "")
    with pytest.raises(ValueError, match="00001.xml, object 0 "):
        voc_objects(ElementTree.fromstring(broken), "00001.xml")
