"""The figures that answer, used in headless Chromium: their numbers against Python's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydata_sphinx_theme import __file__ as theme
from scipy.stats import beta, norm
from sklearn.metrics import confusion_matrix, precision_score, roc_curve
from sphinx.builders.html._assets import _JavaScript

from simplenet_lib.benchmark import scoreboard

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "_ext"))
import offline  # noqa: E402

STATIC = ROOT / "_static"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
NODE = shutil.which("node", path=PATH)
#: Each figure and the picture below which it stands, as the loader has them.
PLACES = dict(re.findall(r'^  (\w+): "(fig-[\w-]+)"', (STATIC / "figures.js").read_text(), re.M))


@pytest.mark.parametrize("name", PLACES)
def test_picture_above_is_in_one_chapter(name: str) -> None:
    chapters = [path.read_text() for path in sorted((ROOT / "notebooks" / "py").glob("*.py"))]
    assert sum(text.count(f'"name": "{PLACES[name]}"') for text in chapters) == 1


def test_every_figure_has_a_place() -> None:
    assert {path.stem for path in (STATIC / "figures").glob("*.js")} == PLACES.keys()


def page(*pictures: str) -> str:
    """A page as the book has it: scripts in any order, each picture in its cell."""
    scripts = [*sorted(STATIC.glob("figures/*.js")), STATIC / "figures.js"]
    styles = Path(theme).parent / "theme/pydata_sphinx_theme/static/styles/pydata-sphinx-theme.css"
    head = [
        f'<link rel="stylesheet" href="{path.as_uri()}">'
        for path in (styles, STATIC / "figures.css")
    ]
    head += [f'<script src="{path.as_uri()}"></script>' for path in scripts]
    body = [
        f'<div class="cell" id="cell-{one}"><figure id="{one}"></figure></div>' for one in pictures
    ]
    return (
        '<!doctype html><html lang="en" data-theme="light"><title>Page</title>'
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'{"".join(head)}<body><main class="bd-article"><h1>Page</h1>{"".join(body)}</main></html>'
    )


def test_load_where_pictures_are() -> None:
    names = ("figures.js", "figures/noise.js", "book.js")
    left = {}
    for body in ("<p>Text</p>", '<figure id="fig-noise-length"></figure>'):
        context = {"body": body, "css_files": [], "script_files": [_JavaScript(n) for n in names]}
        offline.mend_page(None, "page", "page.html", context, None)
        left[body] = [file.filename for file in context["script_files"]]
    assert [*left.values()] == [["book.js"], [*names]]


BETA = [
    (x, a, b)
    for x in (0.001, 0.05, 0.3, 0.975)
    for a, b in ((1, 1), (1, 6), (3, 58), (40, 2), (5, 196))
]


def network() -> dict[str, Any]:
    """First weights of a discriminator of 6 hidden units, and 30 batches, from torch."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 4, generator=generator, dtype=torch.double)
    batches = 2 * torch.randn(30, 2, 16, 2, generator=generator, dtype=torch.double)
    return {"weights": weights.flatten().tolist(), "batches": batches.tolist(), "beta": BETA}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if NODE is None or not (ROOT / "node_modules").exists():
        message = "node or its packages are missing: `make test`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("figures")
    (folder / "page.html").write_text(page(*PLACES.values()))
    (folder / "empty.html").write_text(page("fig-of-another-page"))
    (folder / "network.json").write_text(json.dumps(network()))
    done = subprocess.run(
        [NODE, str(ROOT / "tests" / "figures.mjs"), str(folder)],
        cwd=ROOT, env=os.environ | {"PATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def says(text: str, pattern: str, *expected: float) -> None:
    """The numbers of ``text`` at the groups of ``pattern`` are these, to their last digit."""
    found = re.search(pattern.replace("#", r"([\d.,]+%?)"), text)
    assert found is not None, text
    for shown, number in zip(found.groups(), expected, strict=True):
        digits = shown.rstrip("%").rstrip(".").replace(",", "")
        unit = 10.0 ** -len(digits.partition(".")[2])
        value = 100 * number if shown.endswith("%") else number
        assert float(digits) == pytest.approx(value, abs=0.5001 * unit), (text, shown, number)


def test_stand_below_their_pictures_and_nowhere_else(report: dict[str, Any]) -> None:
    below = zip(report["order"][1::2], report["order"][2::2], strict=True)
    assert dict(below) == {f"cell-{at}": f"answer-{name}" for name, at in PLACES.items()}
    assert report["empty"] == 0


def test_are_accessible_in_both_themes_and_widths(report: dict[str, Any]) -> None:
    assert report["axe"] == [] and report["wide"] == []
    assert report["errors"] == []
    assert report["themed"], "a change of the theme draws anew"
    assert report["printed"] == 0, "paper has the picture"


def test_noise_has_the_length_it_should(report: dict[str, Any]) -> None:
    assert len({(one["channels"], one["sigma"]) for one in report["noise"]}) == 7
    for one in report["noise"]:
        A, sigma = float(one["channels"].replace(",", "")), float(one["sigma"])
        says(one["text"], "σ√A = #. ", float(f"{sigma * A**0.5:.3g}"))
        mean, spread = map(float, re.search(r"are ([\d.]+) ± ([\d.]+)", one["text"]).groups())  # type: ignore[union-attr]
        chi = torch.randn(4000, int(A), generator=torch.Generator().manual_seed(1)).norm(dim=1)
        assert mean == pytest.approx(sigma * float(chi.mean()), rel=0.06 / A**0.5 + 0.005)
        assert spread == pytest.approx(sigma * float(chi.std()), rel=0.1)
        assert one["redrawn"]
        if A == 512:
            nearer = norm.cdf(-512 * sigma / (2 * 13))
            if nearer < 0.00005:
                assert "none of the vectors come nearer" in one["text"]
            else:
                says(one["text"], "this noise # of the vectors come nearer", nearer)


def test_promise_is_the_beta_distribution_s(report: dict[str, Any]) -> None:
    settings = [(int(one["k"]), int(one["n"])) for one in report["promise"]]
    assert settings[:4] == [(3, 60), (3, 81), (81, 81), (1, 1)], "k is never above n"
    for (k, n), one in zip(settings, report["promise"], strict=True):
        low, high = beta.ppf([0.05, 0.95], k, n + 1 - k)
        says(one["text"], r"#/# = #", k, n + 1, k / (n + 1))
        says(one["text"], r"between # and #\.", low, high)
    for (x, a, b), found in zip(BETA, report["beta"], strict=True):
        expected = [beta.cdf(x, a, b), beta.ppf(x, a, b), beta.pdf(x, a, b)]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_verdicts_are_scikit_learn_s(report: dict[str, Any]) -> None:
    labels, rows = scoreboard()
    y, scores = np.array(labels), np.array(rows["one head"])
    assert report["scores"]["normal"] == sorted(scores[y == 0].round(4).tolist())
    assert report["scores"]["defect"] == sorted(scores[y == 1].round(4).tolist())

    fpr, tpr, _ = roc_curve(y, scores, drop_intermediate=False)
    curve = {(round(a, 9), round(b, 9)) for a, b in zip(fpr, tpr, strict=True)}
    for one in report["verdict"]:
        called = scores > float(one["threshold"].replace("−", "-"))
        (tn, fp), (fn, tp) = confusion_matrix(y, called)
        assert [int(cell) for cell in one["cells"]] == [tp, fn, fp, tn]
        assert (round(fp / 20, 9), round(tp / 40, 9)) in curve
        says(one["text"], "True positive rate #, false positive rate #\\.", tp / 40, fp / 20)
        if not called.any():
            assert "no precision" in one["text"]
            continue
        rate = float(one["rate"].rstrip("%")) / 100
        weights = np.where(y == 1, rate / 40, (1 - rate) / 20)
        says(one["text"], "precision is #\\.", precision_score(y, called, sample_weight=weights))
        if fp < 20:
            most = beta.ppf(0.975, fp + 1, 20 - fp)
            there = rate * tp / 40 / (rate * tp / 40 + (1 - rate) * most)
            says(one["text"], "as high as #; then precision is #\\.", most, there)


def test_threshold_follows_keys_mouse_and_finger(report: dict[str, Any]) -> None:
    threshold = {one["how"]: float(one["threshold"]) for one in report["verdict"]}
    at = [one["threshold"] for one in report["verdict"]]
    assert at[0] == "1.00" and float(at[1]) < 1 and at[2] == at[1] and float(at[3]) < -0.4
    assert float(at[4]) > 21.6 and float(at[6]) < float(at[5])
    assert threshold["touch"] < 5 < threshold["drag"] == threshold["hover"]
    assert threshold["touch"] != float(at[6])


def test_boundary_is_the_chapter_s(report: dict[str, Any]) -> None:
    found = report["boundary"]
    for text in (found["start"], found["other"]):
        normal, noisy = map(float, re.findall(r"([\d.]+)%", text))
        assert normal > 85 and 15 < noisy < 50 and text.endswith("anomalous.")
    assert found["start"] != found["other"]
    sigma, text = found["little"]
    assert sigma == "0.4" and text.endswith(": normal."), "the chapter's: the centre is included"
    # One unit can bound nothing: as many noisy points as normal ones.
    normal, noisy = map(float, re.findall(r"([\d.]+)%", found["one"]))
    assert abs(normal - noisy) < 15


def test_training_is_torch_s(report: dict[str, Any]) -> None:
    job = network()
    start = torch.tensor(job["weights"], dtype=torch.double).view(6, 4)
    first, second = torch.nn.Linear(2, 6).double(), torch.nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(start[:, :2])
        first.bias.copy_(start[:, 2])
        second.weight.copy_(start[None, :, 3])
    score = torch.nn.Sequential(first, torch.nn.LeakyReLU(0.2), second)
    optimizer = torch.optim.Adam(score.parameters(), lr=0.02)
    for normal, noisy in torch.tensor(job["batches"], dtype=torch.double):
        loss = (0.5 - score(normal)).relu().mean() + (0.5 + score(noisy)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        weights = torch.cat([first.weight, first.bias[:, None], second.weight.T], dim=1)
        scores = score(torch.tensor(job["batches"][0][0], dtype=torch.double))
    assert report["network"]["weights"] == pytest.approx(weights.flatten().tolist(), abs=1e-9)
    assert report["network"]["scores"] == pytest.approx(scores.flatten().tolist(), abs=1e-9)
