"""LPIPS, FID and KID through the libraries on random weights: that the right pictures, files and
ranges get there. What the published weights would say of pictures has not been verified."""

import importlib.util
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from esd_fast.evaluation import distances, metrics

if any(importlib.util.find_spec(name) is None for name in distances.PACKAGES):
    pytest.skip("the extra eval is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


@pytest.fixture(scope="module", autouse=True)
def operators():
    """torchvision built for another torch lacks its compiled operators, which no network here uses;
    with two of them declared it can be imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    if not hasattr(torch.ops.torchvision, "nms"):
        try:
            import torchvision  # noqa: F401
        except (RuntimeError, ImportError):
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    yield
    del library


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder with random weights in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Weights as torch-fidelity stores them, random, and its network with them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, file)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    return file, NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))


def drawn(seed, count=6, side=32):
    low = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return list(low.repeat(side // 4, 1).repeat(side // 4, 2))


def features(network, pictures):
    return network(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)).double().numpy()


def test_fid_is_the_formula_on_the_networks_features(inception):
    file, network = inception
    one, other = drawn(1), drawn(2, 5)
    found = distances.Inception(file).fid([one[:4], one[4:]], [other])
    a, b = features(network, one), features(network, other)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # of the product's eigenvalues all but a few are zero: of the small Gram matrix they are the same
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    root = scipy.linalg.svdvals(x @ y.T).sum()
    truth = means + sum(np.trace(c) for c in covariances) - 2 * root
    assert found["value"] == pytest.approx(truth, rel=1e-3)
    assert found["images"] == [6, 5]


def test_kid_is_the_formula_on_the_networks_features(inception):
    file, network = inception
    one, other = drawn(1), drawn(2)
    found = distances.Inception(file).kid([one], [other])
    a, b = features(network, one), features(network, other)
    n = len(a)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
    truth = within - 2 * kernel(a, b).mean()
    assert found["value"] == pytest.approx(truth, rel=1e-3)
    assert found["subset_size"] == n


def test_lpips_is_zero_for_the_same_and_grows_with_the_difference(hub):
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), hub / distances.LPIPS_FILE)
    lpips = distances.Lpips()
    pictures, others = drawn(1, side=64), drawn(2, side=64)
    half = [
        ((p.astype(int) + o) // 2).astype(np.uint8) for p, o in zip(pictures, others, strict=True)
    ]
    same, near, far = (lpips.mean([(pictures, to)]) for to in (pictures, half, others))
    assert same == 0
    assert 0 < near < far
    in_batches = lpips.mean([(pictures[:4], others[:4]), (pictures[4:], others[4:])])
    assert in_batches == pytest.approx(far, rel=1e-5)
    network = lpips.metric.net
    tensors = [
        torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2).float() / 127.5 - 1
        for p in (pictures, others)
    ]
    assert far == pytest.approx(float(network(*tensors).mean()), rel=1e-4)


def test_weights_that_are_no_tensors_are_refused(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save(Evil(), hub / distances.LPIPS_FILE)
    with pytest.raises(ValueError, match="more than tensors"):
        distances.Lpips()
    torch.save(Evil(), tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        distances.Inception(tmp_path / "inception.pth")


def test_what_is_missing_is_said_with_its_place(hub):
    with pytest.raises(metrics.Missing, match=distances.INCEPTION_FILE) as missing:
        metrics.METRICS["fid"](metrics.Settings(), False)
    assert str(hub) in str(missing.value)
    (hub / distances.LPIPS_FILE).touch()
    assert metrics.METRICS["lpips"](metrics.Settings(), False)
    with warnings.catch_warnings():
        assert metrics.METRICS["kid"](metrics.Settings(download=True), False)
