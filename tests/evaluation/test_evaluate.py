"""`esd-fast eval`: pictures drawn or taken, numbers from the files, bad arguments before loading."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esd_fast.cli import EVALUATION_METRICS, main
from esd_fast.demo import model_path
from esd_fast.demo.judge import load_judge, recognise
from esd_fast.erasure import Erasure
from esd_fast.evaluation import metrics
from esd_fast.evaluation.drawn import read_drawn
from esd_fast.evaluation.pictures import save_png
from esd_fast.tensor_files import open_tensors

from .tiny_clip import write_tiny_clip

PROMPTS = """case_number,prompt,evaluation_seed,object,style
0,a cat,5,cat,
1,a cat in ink style,6,cat,ink
2,a dog,7,dog,
3,ink style,8,,ink
10,a photo of nothing,9,,
"""


def test_the_command_line_knows_every_metric():
    assert tuple(metrics.METRICS) == EVALUATION_METRICS


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """An erasure of the embedded model that leaves nothing recognisable: one layer of noise."""
    unet = open_tensors(model_path() / "unet" / "diffusion_pytorch_model.safetensors").tensors
    name = "conv_out.weight"
    noise = torch.randn(unet[name].shape, generator=torch.Generator().manual_seed(0))
    erasure = Erasure({name: 0.05 * noise}, {"concept": "cat", "method": "esd-u"})
    folder = tmp_path_factory.mktemp("runs") / "erased-cat"
    erasure.save(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, erased):
    """Drawn and evaluated once."""
    folder = tmp_path_factory.mktemp("drawn")
    prompts = folder / "prompts.csv"
    prompts.write_text(PROMPTS)
    output = folder / "out"
    options = ["--prompts", str(prompts), "--output", str(output), "--num-inference-steps", "4"]
    assert main(["eval", str(erased), *options, "--metric", "judge", "--debug"]) == 0
    return output, options


def judged(folder):
    """What the judge sees, file by file, asked without any of this package's evaluation."""
    judge = load_judge(model_path())
    found = {}
    for path in folder.glob("*.png"):
        picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        verdict = recognise(judge, picture.float() / 127.5 - 1)
        found[path.stem] = {verdict.objects[0], verdict.styles[0]}
    return found


def test_rates_are_what_the_files_show(drawn):
    output, _ = drawn
    told = json.loads((output / "eval.json").read_text())
    table = told["metrics"]["judge"]["by_erasure"]["erased-cat"]
    was, now = judged(output / "base"), judged(output / "erased-cat")
    for when, seen in (("before", was), ("after", now)):
        gone = sum("cat" not in seen[case] for case in ("0_0", "1_0"))
        assert table["UA"][when] == gone / 2
        assert table["IRA"][when] == ("dog" in seen["2_0"])
        assert table["CRA"][when] == ("ink" in seen["3_0"])
    assert table["UA"]["before"] < table["UA"]["after"]
    assert told["erasures"]["erased-cat"]["images"] == {"erased": 2, "kept": 3}
    assert told["concepts"] == {"cat": "object", "dog": "object", "ink": "style"}
    assert set(told["metrics"]["judge"]) >= {"detector", "version", "threshold"}
    assert told["metrics"]["judge"]["interference"]["erased-cat"]["recognised_of"]["ink"][1] == 1


def test_pictures_that_are_there_are_evaluated_again(drawn, tmp_path, capsys):
    output, _ = drawn
    clip = write_tiny_clip(tmp_path / "clip")
    taken = tmp_path / "taken"
    more = ["--clip", str(clip), "--output", str(taken), "--style", "sepia", "--metric"]
    assert main(["eval", "--pictures", str(output), *more, "clip", "--metric", "judge"]) == 0
    first, again = (json.loads((f / "eval.json").read_text()) for f in (output, taken))
    assert again["metrics"]["judge"]["by_erasure"] == first["metrics"]["judge"]["by_erasure"]
    scores = again["metrics"]["clip"]["by_erasure"]["erased-cat"]["score"]
    assert [scores[g]["images"] for g in ("erased", "kept")] == [2, 3]
    page = (taken / "eval.html").read_text()
    for text in ("Interference, as clip sees it", str(clip), "CRA: kept, other domain"):
        assert text in page
    assert "clip" in capsys.readouterr().out


def test_a_second_run_draws_nothing(drawn, erased, capsys):
    _, options = drawn
    assert main(["eval", str(erased), *options, "--metric", "judge"]) == 0
    assert "0 pictures drawn, 10 were there" in capsys.readouterr().out


def test_pairs_of_other_noise_are_refused(drawn, tmp_path):
    output, _ = drawn
    for model in ("base", "erased-cat"):
        (tmp_path / model).mkdir()
        for path in (output / model).glob("*.png"):
            (tmp_path / model / path.name).write_bytes(path.read_bytes())
    assert len(read_drawn(tmp_path).pictures) == 5
    assert [p.name for p in read_drawn(tmp_path).pictures][-1] == "10_0.png"
    image = Image.open(tmp_path / "erased-cat" / "0_0.png")
    save_png(image, tmp_path / "erased-cat" / "0_0.png", {**image.info, "seed": "99"})
    with pytest.raises(ValueError, match=r"seed is '5', now it would be '99'"):
        read_drawn(tmp_path)
    (tmp_path / "erased-cat" / "0_0.png").unlink()
    assert len(read_drawn(tmp_path).pictures) == 4
    with pytest.raises(FileNotFoundError, match="no folder 'base'"):
        read_drawn(tmp_path / "base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give erasures, or --pictures"),
        (["x", "--pictures", "."], "give erasures, or --pictures"),
        (["x", "--prompt", "a", "--prompts", "b"], "not both"),
        (["--pictures", "nowhere"], "--pictures 'nowhere' is no folder"),
        (["--pictures", ".", "--prompt", "a"], "of their own prompts"),
        (["nothing"], "does not exist"),
        (["x", "--nudenet-threshold", "1.5"], "--nudenet-threshold is 1.5"),
        (["x", "--clip", "./no/clip"], "--clip './no/clip' is no folder"),
        (["x", "--inception", "none.pth"], "'none.pth' does not exist"),
        (["x", "--reference", "none"], "--reference 'none' is no folder"),
    ],
)
def test_bad_arguments_are_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_other_models_need_prompts_and_a_wanted_metric_has_to_be_there(
    erased, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(erased), "--model", "else"]) == 2
    assert "give prompts to draw" in capsys.readouterr().err
    assert main(["eval", str(erased), "--metric", "clip"]) == 2
    assert "--metric clip: name one with --clip" in capsys.readouterr().err
