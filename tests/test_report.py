"""The report: numbers read as they are, nothing hidden, nothing executed, and figures that a browser draws."""

import base64
import csv
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from processes import run_process
from settings import spec_segments

from dualhead.cli import main
from dualhead.config import NetworkConfig, PPOConfig
from dualhead.running import report
from dualhead.running.checkpoint import RunError
from dualhead.running.config import RunConfig
from dualhead.running.report import group_runs, write_report
from dualhead.running.report_figures import change, curves, draw, number
from dualhead.running.results import read_run, read_table

NAN = math.nan
GIF = b"GIF89a" + bytes(20)
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Elements, their addresses and the text of a page, with what scripts and styles say apart."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.text, self.scripts, self.inside = [], [], "", [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += f"{data} "

    @property
    def figures(self):
        return json.loads(self.scripts[1])


def make_run(path, metrics, *, steps=None, summary=None, evaluations=None, **settings):
    """A run directory with these columns of numbers, and rows of evaluations; None leaves a cell empty."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(RunConfig(**{"env": "Some-v0", **settings}).model_dump_json())
    steps = steps or [100 * (i + 1) for i in range(len(next(iter(metrics.values()), [])))]
    with (path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["steps", *metrics], *zip(steps, *metrics.values())])
    if evaluations is not None:
        header = "steps,mean_return,std_return,ci95_low,ci95_high,mean_length,episodes"
        (path / "evaluations.csv").write_text("\n".join([header, *evaluations, ""]))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def page_of(*runs):
    return Page(write_report(runs, runs[0].parent / "page.html", replay=False))


def figures_of(**groups):
    """Figures by section of groups of run directories."""
    return draw({name: [curves(read_run(run)) for run in runs] for name, runs in groups.items()})[0]


def finished(steps, **evaluation):
    evaluation = {"mean_return": 7.25, "std_return": 1.5, "episodes": 20} | evaluation
    return {"steps": steps, "stopped_early": False, "seconds": 4.0, "evaluation": evaluation}


def same(array, expected):
    return np.array_equal(array, expected, equal_nan=True)


def test_table_by_hand(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("steps,a,b\r\n10,1.5,\r\n20,nan,2\r\n30,inf,x\r\nodd,7,7\r\n40,4\r\n50,5,0.12")
    table = read_table(path)
    assert table.columns.keys() == {"a", "b"}
    assert table.steps.tolist() == [10, 20, 30]  # the last line was cut off: 0.12 may have been 0.1234
    assert same(table.columns["a"], [1.5, NAN, math.inf])
    assert same(table.columns["b"], [NAN, 2, NAN])
    assert read_table(tmp_path / "missing.csv").steps.tolist() == []


def test_steps_that_a_resumed_run_wrote_again_count_once(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("steps,a\n10,1\n20,2\n30,3\n20,22\n30,33\n40,44\n")
    table = read_table(path)
    assert table.steps.tolist() == [10, 20, 30, 40]
    assert table.columns["a"].tolist() == [1, 22, 33, 44]


def test_a_long_curve_is_drawn_by_means_lowest_and_highest(tmp_path):
    values = np.tile([1.0, 5.0], 500)
    values[300:320], values[432], values[876] = NAN, -7.0, 90.0
    run = make_run(tmp_path / "run", {"loss/total": values.tolist()}, steps=range(10, 10_010, 10))
    (figure,) = figures_of(lstm=[run])["Optimisation"]
    area, line = figure.traces
    # Stretches of ten points: the mean step of the first is 55, its mean 3.
    steps, means = 55 + 100 * np.arange(100), np.full(100, 3.0)
    means[30:32], means[43], means[87] = NAN, 2.2, 11.9  # (4 * 1 + 5 * 5 - 7) / 10, (4 * 1 + 5 * 5 + 90) / 10
    assert line["x"].tolist() == steps.tolist()
    np.testing.assert_allclose(line["y"], means, rtol=1e-6)
    low, high = np.where(steps == 4355, -7.0, 1.0), np.where(steps == 8755, 90.0, 5.0)
    sides = slice(30), slice(32, None)  # of the gap
    assert same(area["y"], np.concatenate([y for side in sides for y in (high[side], low[side][::-1], [NAN])]))
    assert figure.band == "lowest to highest"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], "1 → 3"),
        ([NAN, 0.5, 0.25, NAN], "0.5 → 0.25"),
        ([4, 4.0001], "4"),
        ([-12345.6], "−12,346"),
        ([NAN], "–"),
        ([0] * 10 + [1] * 8 + [2, 4], "0 → 3"),  # of twenty numbers the last two
    ],
)
def test_change_between_the_first_and_the_last_tenth(values, expected):
    assert change(np.array(values, dtype=float)) == expected


def test_numbers_as_text():
    assert [number(value) for value in (1234.5, 0.123456, -2e-7, NAN)] == ["1,234", "0.123", "−2e-07", "–"]


def test_runs_that_differ_in_the_seed_are_one_group(tmp_path):
    runs = []
    for memory in ("lstm", "none"):
        for seed in (0, 1, 2):
            path = tmp_path / f"{memory}{seed}"
            settings = {"network": NetworkConfig(memory=memory), "seed": seed, "run_dir": str(path)}
            runs.append(read_run(make_run(path, {"a": [1.0]}, **settings)))
    groups = group_runs(runs)
    assert {name: [run.config.seed for run in members] for name, members in groups.items()} == {
        "memory=lstm": [0, 1, 2],
        "memory=none": [0, 1, 2],
    }


def test_groups_with_many_differences_have_the_names_of_their_folders(tmp_path):
    ppo = spec_segments(gamma=0.9, gae_lambda=0.8, clip_coef=0.1)
    paths = [
        make_run(tmp_path / "a", {"a": [1.0]}, num_envs=8, ppo=spec_segments()),
        make_run(tmp_path / "b", {"a": [1.0]}, num_envs=4, ppo=ppo),
        make_run(tmp_path / "c", {"a": [1.0]}, num_envs=4, ppo=ppo.model_copy(update={"gamma": 0.5})),
    ]
    assert list(group_runs([read_run(path) for path in paths])) == [str(path) for path in paths]
    # In a folder for each condition, as studies have them, the folder is the name.
    moved = [tmp_path / f"condition-{path.name}" / "seed0" for path in paths]
    for path, there in zip(paths, moved):
        shutil.copytree(path, there)
    assert list(group_runs([read_run(path) for path in moved])) == ["condition-a", "condition-b", "condition-c"]
    text = page_of(*paths).text
    assert all(name in text for name in ("ppo.gamma", "ppo.gae_lambda", "ppo.clip_coef", "num_envs"))


def test_report_of_a_trained_run(tmp_path, capsys):
    options = ["--total-steps", "128", "--num-envs", "2", "--rollout-length", "16", "--batch-size", "16"]
    options += ["--hidden-size", "8", "--encoder-sizes", "8", "--eval-episodes", "2", "--num-threads", "1"]
    run = tmp_path / "run"
    assert main(["train", "dualhead/RecallCue-v0", *options, "--run-dir", str(run), "--gamma", "0.875"]) == 0
    capsys.readouterr()
    assert main(["report", str(run), "--no-replay"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page(run / "report.html")
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['evaluation']['mean_return']:.3g}".replace("-", "−") in page.text
    assert "lstm on dualhead/RecallCue-v0" in page.text
    assert "finished" in page.text
    assert re.search(rf"ppo\.gamma\s+Discount per step\.\s+{PPOConfig().gamma}\s+0\.875\s", page.text)
    assert re.search(r"network\.forget_bias\s+[^.]+\.\s+0\.0\s+2\.0\s+tuned", page.text)
    assert "gae_lambda" in page.text  # tuned, not given
    assert "clip_coef" not in page.text  # the default
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")[1:]
    assert len(columns) > 20
    assert [name for name in columns if name not in page.text] == []
    assert len(page.figures) == page.tags.count("figure") > 15
    assert page.addresses == []
    assert "default-src 'none'" in (run / "report.html").read_text()


def test_numbers_in_figures_are_those_of_the_file(tmp_path):
    run = make_run(tmp_path / "run", {"episode/mean_return": [1, None, 2.5, 4]})
    (figure,) = figures_of(lstm=[run])["Learning"]
    (trace,) = figure.traces
    assert trace["x"].tolist() == [100, 200, 300, 400]
    assert same(trace["y"], [1, NAN, 2.5, 4])
    assert trace["mode"] == "lines+markers"  # the first point has no neighbour to draw a line to
    assert "1 number missing" in figure.note
    assert (figure.unit, figure.title) == ("task reward per episode", "Return in training")
    assert "Return in training: 1 → 4" in page_of(run).text


def test_seeds_are_thin_lines_under_their_mean_and_range(tmp_path):
    """Mean and range are at the steps that all seeds have; where one has no number the band is cut."""
    numbers = [1, 2, 3, 4, 5], [3, 5, None, 7]
    runs = [make_run(tmp_path / str(seed), {"loss/total": x}, seed=seed) for seed, x in enumerate(numbers)]
    (figure,) = figures_of(lstm=runs)["Optimisation"]
    area, *seeds, mean = figure.traces
    assert figure.band == "lowest to highest seed"
    assert same(area["y"], [3, 5, 2, 1, NAN, 7, 4, NAN])
    assert area["x"][[0, 1, 2, 3, 5, 6]].tolist() == [100, 200, 200, 100, 400, 400]
    for trace, expected in zip((*seeds, mean), ([1, 2, 3, 4, 5], [3, 5, NAN, 7], [2, 3.5, NAN, 5.5])):
        assert same(trace["y"], expected)
    assert mean["x"].tolist() == [100, 200, 300, 400]
    assert mean["line"]["width"] > seeds[0]["line"]["width"]


def test_heads_share_a_figure_until_runs_are_compared(tmp_path):
    a = make_run(tmp_path / "a", {"entropy/move": [1.0, 0.5], "entropy/vote": [1.0, 0.25]})
    b = make_run(tmp_path / "b", {"entropy/move": [1.0, 0.75]}, num_envs=4)
    (alone,) = figures_of(lstm=[a])["Policy"]
    assert (alone.title, alone.lines) == ("Entropy", [("move", 0, "1 → 0.5"), ("vote", 1, "1 → 0.25")])
    move, vote = figures_of(A=[a], B=[b])["Policy"]
    assert (move.title, move.lines) == ("Entropy (move)", [("A", 0, "1 → 0.5"), ("B", 1, "1 → 0.75")])
    assert (vote.title, vote.lines) == ("Entropy (vote)", [("A", 0, "1 → 0.25")])
    assert re.search(r"move: 1 → 0\.5\s+vote: 1 → 0\.25", page_of(a).text)


def test_no_metric_is_hidden(tmp_path):
    metrics = {
        "norms/strength/A": [0.0, 6.5],
        "norms/guilt/A": [0.0, -0.5],
        "rollout/guilt": [0.0, -0.25],
        "commons/collected/A": [0.5, 0.25],
        "commons/collected/B": [0.5, 0.75],
        "commons/punishment_level": [3, 4],
        "plain": [1, 2],
        "commons/never": [NAN, None],
    }
    run = make_run(tmp_path / "run", metrics)
    sections, empty = draw({"lstm": [curves(read_run(run))]})
    assert empty == ["commons/never"]
    shown = {section: {f.title: [label for label, *_ in f.lines] for f in figs} for section, figs in sections.items()}
    assert shown == {
        "Norms": {"Norm strength": ["A"], "Guilt by resource": ["A"], "Guilt": [""]},
        "Commons": {"Collected": ["A", "B"], "Punishment level": [""]},
        "Plain": {"Plain": [""]},
    }
    text = page_of(run).text
    assert [name for name in metrics if name not in text] == []


@pytest.mark.parametrize(
    ("rows", "reach", "said"),
    [
        (
            ["100,1,9,0,2,5,20", "200,3,9,2.5,4,6,20"],
            [2, 4, 2.5, 0, NAN],
            "95% interval 2.5 to 4, in evaluation after 200",
        ),
        (["100,1,0,0.5,1.5,5,20"], None, "95% interval 0.5 to 1.5, in evaluation after 100 steps"),
        (["100,1,0,nan,nan,5,1", "200,2,0,nan,nan,5,1"], None, "in evaluation after 200 steps"),
    ],
    ids=["two evaluations", "one evaluation", "of one episode each"],
)
def test_evaluations_with_their_interval_where_one_is_drawn(tmp_path, rows, reach, said):
    run = make_run(tmp_path / "run", {"a": [1, 2]}, evaluations=rows)
    returns, lengths = figures_of(lstm=[run])["Learning"]
    text = page_of(run).text
    assert said in text
    assert "interval –" not in text
    assert (returns.band == "95% interval over episodes") == ("over episodes" in text) == (reach is not None)
    assert lengths.band == ""
    *areas, _ = returns.traces
    assert len(areas) == (reach is not None)
    assert all(same(area["y"], reach) for area in areas)


def test_sentences_of_the_page_are_set_apart(tmp_path):
    runs = [make_run(tmp_path / f"{seed}", {"a": [1, 2]}, seed=seed) for seed in (1, 2)]
    assert re.search(r"seeds of a setting have\.\s+Of more than", page_of(*runs).text)


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (None, ["not finished", "running or killed", "2 ", "in training after 200 steps", "of 100,000"]),
        (finished(200), ["finished", "7.25", "± 1.5 (deviation), evaluation over 20 episodes"]),
        (finished(200, ci95_low=6, ci95_high=8.5), ["7.25", "95% interval 6 to 8.5, evaluation over 20 episodes"]),
        ({"steps": 210, "stopped_early": True, "seconds": 1}, ["stopped", "210", "with a checkpoint"]),
        (finished(100), ["not finished", "in training after 200 steps"]),  # resumed since
        ([], ["not finished"]),
    ],
)
def test_status_and_return(tmp_path, summary, expected):
    run = make_run(tmp_path / "run", {"episode/mean_return": [1, 2], "time/rollout_s": [2, 3]}, summary=summary)
    text = page_of(run).text
    assert [words for words in expected if words not in text] == []
    assert re.search(r"Training time\s+0:00:05", text)
    assert re.search(r"Speed\s+4[02] ", text)


def test_comparison_says_mean_and_reach_of_the_seeds(tmp_path):
    runs = []
    for memory, seed, value in (("lstm", 0, 10), ("lstm", 1, 20), ("gru", 0, 1), ("gru", 1, 4)):
        settings = {"network": NetworkConfig(memory=memory), "seed": seed}
        summary = finished(100, mean_return=value)
        runs.append(make_run(tmp_path / f"{memory}{seed}", {"a": [1]}, summary=summary, **settings))
    text = page_of(*runs, runs[0]).text
    assert re.search(r"memory=lstm\s+15\s+mean; seeds reach from 10 to 20\s+0, 1\s+100", text)
    assert re.search(r"memory=gru\s+2\.5\s+mean; seeds reach from 1 to 4\s+0, 1\s+100", text)
    assert "2 finished" in text


def test_default_places(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        make_run(tmp_path / name, {"a": [1]}, seed=seed)
    for arguments, expected in ((["a"], "a/report.html"), (["a", "b"], "report.html"), (["a", "--out", "x"], "x")):
        assert main(["report", *arguments, "--no-replay"]) == 0
        assert capsys.readouterr().out.strip() == expected
        assert (tmp_path / expected).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["run", "fresh"], "fresh has no numbers yet"),
        (["run", "header"], "header has no numbers yet"),
        (["run", "--out", "no/such/page.html"], "cannot write the report no/such/page.html: no such folder"),
        (["run", "--out", "run"], "cannot write the report run: Is a directory"),
    ],
)
def test_mistakes_give_one_clear_message(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", {"a": [1]})
    make_run(tmp_path / "header", {"a": []})
    (make_run(tmp_path / "fresh", {}) / "metrics.csv").unlink()
    assert main(["report", *arguments, "--no-replay"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=rf"{package}: pip install -e '\.\[report\]'"):
        write_report([make_run(tmp_path / "run", {"a": [1]})])


def test_text_of_runs_is_never_markup(tmp_path):
    evil = """</script></title><img src=x onerror=alert(1)><a href="https://example.org">&amp;{{ 7*7 }}"'"""
    plain = page_of(make_run(tmp_path / "plain", {"a": [1]}), make_run(tmp_path / "other", {"a": [1]}, num_envs=4))
    for seed, env in enumerate(("x", evil)):
        make_run(tmp_path / f"<b>{seed}", {f"commons/{evil.split('/')[0]}": [1], "a": [1]}, env=env)
    page = page_of(tmp_path / "<b>0", tmp_path / "<b>1")
    assert set(page.tags) == set(plain.tags)
    assert page.tags.count("script") == plain.tags.count("script") == 3
    assert evil in page.text
    names = {trace["name"] for figure in page.figures for trace in figure["traces"]}
    assert not any("<" in name for name in names)  # plotly.js reads tags in names
    assert any("&lt;a href" in name for name in names)


def test_page_of_a_long_run_stays_small(tmp_path):
    values = np.random.default_rng(0).normal(size=20_000).round(6).tolist()
    sizes = []
    for length in (1000, 20_000):
        run = make_run(tmp_path / str(length), {"a": values[:length], "b": values[:length]})
        sizes.append(write_report([run], replay=False).stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 5000


def test_replay_is_recorded_where_the_run_has_none(tmp_path, monkeypatch):
    calls = []

    def record_video(run_dir, path, *, max_steps, seed, **parts):
        calls.append((run_dir, max_steps > 0, seed))
        path.write_bytes(GIF)

    def shown():
        return Page(write_report([run], tmp_path / "page.html")).addresses

    monkeypatch.setitem(sys.modules, "dualhead.running.video", SimpleNamespace(record_video=record_video))
    run = make_run(tmp_path / "run", {"a": [1]})
    before = sorted(run.iterdir())
    assert shown() == ["data:image/gif;base64," + base64.b64encode(GIF).decode()]
    assert calls == [(run, True, 10_000)]
    assert sorted(run.iterdir()) == before
    assert "img" not in page_of(run).tags
    (run / "replay.gif").write_bytes(GIF + b"own")
    assert shown() == ["data:image/gif;base64," + base64.b64encode(GIF + b"own").decode()]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RunError("Some-v0 <b>cannot</b> be filmed"), "Some-v0 <b>cannot</b> be filmed"),
        (ModuleNotFoundError("No module named 'imageio'", name="imageio"), "recording needs imageio"),
    ],
)
def test_no_replay_says_why(tmp_path, monkeypatch, error, expected):
    def fail(*_, **parts):
        raise error

    monkeypatch.setattr(report, "_record", fail)
    run = make_run(tmp_path / "run", {"a": [1]})
    assert expected in Page(write_report([run])).text
    for contents, problem in ((b"<script>alert(1)</script>", "is no GIF"), (GIF + bytes(11_000_000), "has 11 MB")):
        (run / "replay.gif").write_bytes(contents)
        page = Page(write_report([run]))
        assert f"replay.gif {problem}" in page.text
        assert "img" not in page.tags


PROBE = """
let triesLeft = 100;
addEventListener("load", () => { const timer = setInterval(() => {
  const drawn = [...plots].filter(plot => plot.querySelector(".scatterlayer path.js-line"));
  if (drawn.length < plots.length && triesLeft--) return;
  clearInterval(timer);
  const stroke = document.querySelector("path.js-line").style.stroke;
  parent.postMessage(JSON.stringify({
    figures: plots.length, drawn: drawn.length, stroke: stroke, width: innerWidth,
    page: getComputedStyle(document.body).backgroundColor,
    tooWide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    tablesCutOff: [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
    bands: document.querySelectorAll("path.js-fill").length, points: document.querySelectorAll("path.point").length,
    plotWidth: Math.max(...[...plots].map(plot => plot.querySelector("svg").getBoundingClientRect().width)),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
  }), "*");
}, 300); });
</script>
</body>
"""
FRAME = """<iframe src="page.html" style="width:%dpx;height:900px"></iframe><pre></pre>
<script>onmessage = message => { document.querySelector("pre").textContent = message.data; };</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(
    ("scheme", "width", "page", "stroke"),
    [("light", 1300, "rgb(246, 247, 248)", "rgb(0, 114, 178)"), ("dark", 390, "rgb(17, 20, 23)", "rgb(88, 178, 234)")],
)
def test_a_browser_draws_the_page(tmp_path, scheme, width, page, stroke):
    runs = []
    for n, s in ((4, 0), (4, 1), (8, 0), (8, 1)):
        metrics = {"episode/mean_return": [1, 3 + s, 2], "loss/total": [None, 1 + s, None], "time/rollout_s": [1, s, 1]}
        runs.append(make_run(tmp_path / f"{n}-{s}", metrics, seed=s, num_envs=n))
    html = write_report(runs, tmp_path / "page.html", replay=False).read_text()
    (tmp_path / "page.html").write_text(html.replace("</script>\n</body>", PROBE))
    (tmp_path / "frame.html").write_text(FRAME % width)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000"]
    command += ["--virtual-time-budget=60000", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom"]
    done = run_process([*command, (tmp_path / "frame.html").as_uri()])
    assert done.returncode == 0, done.stderr
    seen = json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])
    assert seen.pop("plotWidth") > 250
    assert seen == {
        "figures": 3,
        "drawn": 3,
        "bands": 4,  # one loss alone has no neighbour to span a band with
        "points": 6,
        "stroke": stroke,
        "page": page,
        "width": width,
        "tooWide": 0,
        "tablesCutOff": 0,
        "fetched": [],
    }
