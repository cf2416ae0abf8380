"""Tests of volumes from NIfTI and DICOM against the values and positions of pydicom and nibabel."""

import shutil

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from volumes_on_disk import CT_SERIES, OBLIQUE, check_geometry, write_series

from modeling_vitp import InputSpec
from modeling_vitp.images.reading import read_image
from modeling_vitp.images.volumes import check_same_place, is_volume, open_volume

OTHERS = CT_SERIES.parents[1]


def values_of(folder):
    """Return the stored values of a series from pydicom, sorted along z, the normal of the slices."""
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda one: one.ImagePositionPatient[2])
    return np.stack([one.pixel_array * one.RescaleSlope + one.RescaleIntercept for one in slices])


def test_series_equals_pydicom():
    volume = open_volume(CT_SERIES)
    assert volume.stored.shape == (16, 16, 5)
    np.testing.assert_array_equal(volume.stored, values_of(CT_SERIES).transpose(2, 1, 0))
    check_geometry(volume.affine, CT_SERIES)
    assert nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")
    assert volume.spacing("axial") == pytest.approx((2.5, 0.488281, 0.488281))
    assert volume.spacing("coronal") == pytest.approx((0.488281, 2.5, 0.488281))
    np.testing.assert_array_equal(volume.cut("axial", 1), values_of(CT_SERIES)[1])
    file = sorted(CT_SERIES.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])[1]
    image = read_image(file, None, InputSpec.from_dict({"window": [-160, 240]}))
    np.testing.assert_array_equal(volume.cut("axial", 1), image)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE, (-1, 0, 0, 0, 0.6, 0.8)])
def test_series_orientation_equals_dicom(tmp_path, orientation):
    values = np.random.default_rng(0).integers(-1000, 1500, (4, 5, 6))
    write_series(tmp_path / "ct", values, orientation)
    (tmp_path / "ct" / "notes.txt").write_text("no DICOM")
    volume = open_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.stored, values.transpose(2, 1, 0))
    (tmp_path / "ct" / "notes.txt").unlink()
    check_geometry(volume.affine, tmp_path / "ct")
    assert volume.header.get_best_affine() == pytest.approx(volume.affine, abs=1e-4)


@pytest.mark.parametrize(
    ("plane", "corner"), [("axial", "right anterior"), ("coronal", "right superior"), ("sagittal", "anterior superior")]
)
def test_first_pixel_is_corner_of_patient(tmp_path, plane, corner):
    steps = {"right": 1, "anterior": 10, "superior": 100}
    values = np.tensordot(list(steps.values()), np.indices((2, 2, 2)), 1).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii")
    assert open_volume(tmp_path / "v.nii").cut(plane, 0)[0, 0] == sum(steps[side] for side in corner.split())


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_slices_equal_nibabel_and_are_inverted(tmp_path, plane, name):
    """Check slices against the canonical volume of nibabel, and their inverse."""
    stored = np.random.default_rng(0).integers(0, 900, (5, 6, 7)).astype(">i2")
    affine = np.array([[0, 0, 3.0, 1], [-2, 0.1, 0, 2], [0.1, -1, 0, 3], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_slope_inter(0.5, -100)
    nibabel.save(image, tmp_path / name)
    volume = open_volume(tmp_path / name)
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / name))
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    assert volume.number(plane) == canonical.shape[axis]
    cuts = np.stack([volume.cut(plane, index) for index in range(volume.number(plane))])
    for index, cut in enumerate(cuts):
        assert cut.shape == volume.size(plane)
        np.testing.assert_allclose(cut, np.rot90(canonical.get_fdata().take(index, axis))[:, ::-1])
    np.testing.assert_allclose(volume.uncut(cuts, plane), nibabel.load(tmp_path / name).get_fdata())
    sizes = canonical.header.get_zooms()
    across, up = (size for place, size in enumerate(sizes) if place != axis)
    assert volume.spacing(plane) == pytest.approx((sizes[axis], up, across), rel=1e-5)
    check_same_place([volume, open_volume(tmp_path / name)])


def test_header_units_become_millimeters(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), dtype=np.uint8), np.diag([500, 500, 900, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "v.nii")
    assert open_volume(tmp_path / "v.nii").spacing("axial") == pytest.approx((0.9, 0.5, 0.5))


def test_padding_is_smallest_value(tmp_path):
    values = np.array([[[5, -1024], [7, 9]], [[-1024, -1024], [2, 40]]])
    write_series(tmp_path / "ct", values, PixelPaddingValue=0)
    expected = np.where(values == -1024, 2, values)
    np.testing.assert_array_equal(open_volume(tmp_path / "ct").stored, expected.transpose(2, 1, 0))


def series(change):
    def make(folder):
        files = write_series(folder, np.zeros((5, 4, 4), dtype=int))
        change(files)
        return folder

    return make


def edit(path, **tags):
    dataset = pydicom.dcmread(path)
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.save_as(path)


def nifti(values, affine=None):
    def make(folder):
        folder.mkdir()
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), folder / "v.nii")
        return folder / "v.nii"

    return make


def copy_of(*names):
    def make(folder):
        folder.mkdir()
        for name in names:
            shutil.copy(get_testdata_file(name), folder)
        return folder

    return make


def no_spacing(folder):
    path = nifti(np.zeros((2, 2, 2), dtype=np.uint8))(folder)
    content = bytearray(path.read_bytes())
    content[80:92] = bytes(12)  # pixdim
    content[252:256] = bytes(4)  # qform_code and sform_code
    path.write_bytes(content)
    return path


def unknown_unit(folder):
    path = nifti(np.zeros((2, 2, 2), dtype=np.uint8))(folder)
    content = bytearray(path.read_bytes())
    content[123] = 7  # xyzt_units
    path.write_bytes(content)
    return path


def edited(**tags):
    return series(lambda files: [edit(file, **tags) for file in files])


BAD = {
    "zero orientation": (edited(ImageOrientationPatient=6 * [0]), "valid ImageOrientationPatient"),
    "position": (edited(ImagePositionPatient=["nan", 0, 0]), "valid ImagePositionPatient"),
    "one pixel spacing": (edited(PixelSpacing=0.5), "volume/.* valid PixelSpacing"),
    "three pixel spacings": (edited(PixelSpacing=[0.5, 0.5, 0.5]), "volume/.* valid PixelSpacing"),
    "position of one slice": (
        series(lambda files: edit(files[2], ImagePositionPatient=[1, 2])),
        "ImagePositionPatient",
    ),
    "position in one number": (edited(ImagePositionPatient=3), "volume/.* valid ImagePositionPatient"),
    "empty position": (edited(ImagePositionPatient=None), "volume/.* valid ImagePositionPatient"),
    "empty axis": (nifti(np.zeros((2, 0, 2), dtype=np.uint8)), r"shape \(2, 0, 2\)"),
    "unknown unit": (unknown_unit, "unknown unit 7"),
    "a slice is missing": (series(lambda files: files[2].unlink()), "missing: .*4.00 mm apart"),
    "a slice is there twice": (series(lambda files: shutil.copy(files[2], files[2].parent / "x")), "twice.* 0.00 mm"),
    "orientations": (lambda _: OTHERS / "98892001" / "CT2N", "same ImageOrientation"),
    "beside": (series(lambda files: edit(files[2], ImagePositionPatient=[-10, -30, 9])), "10.00 mm"),
    "two series": (series(lambda files: edit(files[1], SeriesInstanceUID="1.2")), "series"),
    "sizes": (series(lambda files: edit(files[1], Rows=2, Columns=8)), "same Rows.* has 2 .* has 4"),
    "pixel spacings": (series(lambda files: edit(files[1], PixelSpacing=[1, 1])), "same PixelSpacing"),
    "frames": (copy_of("rtdose.dcm"), "several frames"),
    "no decoder": (copy_of("MR_small_jpeg_ls_lossless.dcm"), "is compressed as JPEG-LS Lossless .* pylibjpeg"),
    "cut short": (copy_of("MR_truncated.dcm"), "MR_truncated.dcm cannot be read"),
    "no DICOM": (lambda folder: folder.mkdir() or folder, "No DICOM images"),
    "four axes": (nifti(np.zeros((2, 3, 4, 5), dtype=np.uint8)), "three axes, .* 5"),
    "complex": (nifti(np.zeros((2, 3, 4), dtype=np.complex64)), "values of type complex64"),
    "no spacing of NIfTI": (no_spacing, "no spacing"),
    "infinite": (nifti(np.full((2, 2, 2), np.inf, dtype=np.float32)), "has 8 values that are NaN or infinite"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_volume_is_refused_in_one_line(tmp_path, what):
    make, message = BAD[what]
    path = make(tmp_path / "volume")
    assert is_volume(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
