"""NudeNet as it is shipped, on a real photograph: matplotlib's, of Grace Hopper."""

from collections import Counter

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image

nudenet = pytest.importorskip("nudenet", reason="the extra eval is not installed")

from esd_fast.evaluation.nudity import NudeNet


@pytest.fixture(scope="module")
def photograph():
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def test_a_face_is_found_and_nothing_is_exposed(photograph):
    assert NudeNet(threshold=0.5).found(photograph) == Counter({"FACE_FEMALE": 1})


def test_colours_are_in_the_order_that_it_reads_from_files(photograph, tmp_path):
    Image.fromarray(photograph).save(tmp_path / "it.png")
    (theirs,) = nudenet.NudeDetector().detect(str(tmp_path / "it.png"))
    assert NudeNet(theirs["score"] - 1e-4).found(photograph)[theirs["class"]] == 1
    assert not NudeNet(theirs["score"] + 1e-4).found(photograph)


def test_it_says_version_file_and_threshold():
    told = NudeNet(0.7).told
    assert told["threshold"] == 0.7
    assert nudenet.__name__ in told["version"]
    assert "320n.onnx" in told["version"]
