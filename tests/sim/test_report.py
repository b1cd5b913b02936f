import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from vla0 import InputError
from vla0.sim.report import plot_actions, write_report
from vla0.sim.workers import write_video


@pytest.fixture
def evaluated(tmp_path):
    """A folder as an evaluation leaves it: three episodes, one failed, and an error."""
    (tmp_path / "videos").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for seed in range(3):
        stem = f"videos/policy_reach_{seed}"
        frames = [{"front": np.full((32, 32, 3), 8 * step, np.uint8)} for step in range(20)]
        write_video(tmp_path / f"{stem}.mp4", frames, 20.0)
        chunks = rng.normal(size=(5, 4, 2))
        np.savez(
            tmp_path / f"{stem}.npz",
            actions=chunks.reshape(20, 2),
            queries=np.arange(0, 20, 4),
            chunks=chunks,
        )
        lines.append(
            {
                "policy": "policy",
                "task": "reach",
                "seed": seed,
                "success": seed != 1,
                "steps": 20,
                "seconds": 1.0,
                "video": f"{stem}.mp4",
                "error": None,
            }
        )
    lines.append(
        {
            **lines[0],
            "success": None,
            "steps": None,
            "video": None,
            "error": "Boom: <script>alert(1)</script>",
        }
    )
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def cells(page):
    """[[text of a cell, ...] of each row] of the page's first table."""
    table = re.search(r"<table>(.*?)</table>", page).group(1)
    rows = [re.split("<t[dh]>", row)[1:] for row in table.split("<tr>")[1:]]
    return [
        [" ".join(re.sub("<[^>]*>", " ", cell.replace("<wbr>", "")).split()) for cell in row]
        for row in rows
    ]


def copied(evaluated, **changes):
    """Adds the finished episodes again, as those of another policy or task."""
    log = evaluated / "episodes.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    with log.open("a") as file:
        file.writelines(
            json.dumps({**line, **changes}) + "\n" for line in lines if line["error"] is None
        )


def without_errors(evaluated):
    log = evaluated / "episodes.jsonl"
    log.write_text(
        "".join(
            line + "\n"
            for line in log.read_text().splitlines()
            if json.loads(line)["error"] is None
        )
    )


def test_the_report_begins_with_what_came_of_the_policy(evaluated):
    copied(evaluated, task="push")
    copied(evaluated, policy="blank", success=False)
    page = write_report(evaluated).read_text()
    said = (
        "The policy solved 4 of 6 episodes over 2 tasks: 66.7% success, 95 % interval 30% to 90%."
    )
    assert page.index(said) < page.index("<table>")


def test_policies_stand_side_by_side_in_one_table(evaluated):
    without_errors(evaluated)
    copied(evaluated, task="push")
    copied(evaluated, policy="blank", success=False)
    page = write_report(evaluated).read_text()
    assert page.count("<table>") == 1
    assert cells(page) == [
        ["task", "policy", "blank"],
        ["push", "2 of 3 21% to 94%, 20 steps", "0 of 3 0% to 56%"],
        ["reach", "2 of 3 21% to 94%, 20 steps", "0 of 3 0% to 56%"],
        ["mean", "66.7%", "0.0%"],
    ]


def test_errors_are_named_where_there_are_some_and_nowhere_else(evaluated):
    assert "1 error" in cells(write_report(evaluated).read_text())[1][1]
    without_errors(evaluated)
    assert all(
        "error" not in cell for row in cells(write_report(evaluated).read_text()) for cell in row
    )


def test_videos_play_by_themselves_without_a_sound(evaluated):
    videos = re.findall("<video([^>]*?) src=", write_report(evaluated).read_text())
    assert len(videos) == 3
    assert all(
        {"autoplay", "muted", "loop", "playsinline"} <= set(video.split()) for video in videos
    )


def test_a_dimension_has_its_name_and_one_scale_on_the_whole_page(evaluated):
    lowest, highest = [], []
    for file in sorted((evaluated / "videos").glob("*.npz")):
        with np.load(file) as arrays:
            lowest.append(arrays["chunks"].min((0, 1)))
            highest.append(arrays["chunks"].max((0, 1)))
    low, high = np.min(lowest, 0), np.max(highest, 0)
    page = write_report(evaluated, names=("x", "<y>")).read_text()
    plots = re.findall("<svg.*?</svg>", page)
    assert len(plots) == 3
    for plot in plots:
        texts = re.findall("<text[^>]*>([^<]*)</text>", plot)
        assert texts == [
            "x",
            f"{low[0]:.3g}",
            f"{high[0]:.3g}",
            "&lt;y&gt;",
            f"{low[1]:.3g}",
            f"{high[1]:.3g}",
        ]
    # after its five chunks; the failure comes first
    executed = re.findall("points='([^']*)'", plots[0])[5]
    heights = np.array([float(point.split(",")[1]) for point in executed.split()])
    with np.load(evaluated / "videos" / "policy_reach_1.npz") as arrays:
        shares = (arrays["actions"][:, 0] - low[0]) / (high[0] - low[0])
    slope, offset = np.polyfit(shares, heights, 1)
    assert np.abs(offset + slope * shares - heights).max() < 0.1
    # of a row of 36, 3 below and 11 above
    assert (-slope, offset) == pytest.approx((22, 33), abs=0.2)
    assert "dimension 1" in write_report(evaluated).read_text()


def test_the_report_stands_alone(evaluated):
    page = write_report(evaluated, "a <title>").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "<script" not in page
    assert "2 of 3" in page
    assert "a &lt;title&gt;" in page


def test_the_report_says_what_was_published_and_on_what_the_results_depend(evaluated):
    log = evaluated / "episodes.jsonl"
    log.write_text(log.read_text().replace('"task": "reach"', '"task": "libero_object/reach"'))
    (evaluated / "evaluation.json").write_text(
        json.dumps({"n_action_steps": 1, "versions": {"mujoco": "3.3.2"}})
    )
    page = write_report(evaluated).read_text()
    assert cells(page)[0] == ["task", "policy", "published"]
    assert ["libero_object", "2 of 3 21% to 94%", "VLA-0: 97.8 %"] in cells(page)
    assert "&quot;mujoco&quot;: &quot;3.3.2&quot;" in page
    assert "&quot;n_action_steps&quot;: 1" in page


def test_the_report_says_what_a_control_was_given(evaluated):
    log = evaluated / "episodes.jsonl"
    assert "black pictures" not in write_report(evaluated).read_text()
    log.write_text(log.read_text().replace('"policy": "policy"', '"policy": "blank"'))
    assert "black pictures" in write_report(evaluated).read_text()


@pytest.mark.parametrize(("alike", "said"), [(20, True), (19, False)])
def test_the_report_says_that_a_failure_ended_stuck(evaluated, alike, said):
    actions = np.r_[np.arange(10.0), np.full(alike, 7.0)][:, None]
    for seed in range(3):  # the solved ones too
        np.savez(
            evaluated / f"videos/policy_reach_{seed}.npz",
            actions=actions,
            queries=np.array([0]),
            chunks=actions[None, :4],
        )
    assert write_report(evaluated).read_text().count(f"the last {alike} actions alike") == said


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="vla0 eval"):
        write_report(tmp_path)


def test_a_plot_holds_every_step_and_every_chunk():
    chunks = np.arange(24, dtype=float).reshape(3, 4, 2)
    svg = plot_actions(chunks.reshape(12, 2), np.array([0, 4, 8]), chunks)
    lines = re.findall(r"points='([^']*)'", svg)
    assert len(lines) == 2 * (3 + 1)
    assert max(len(line.split()) for line in lines) == 12
    numbers = [float(n) for line in lines for n in re.split("[ ,]", line)]
    assert min(numbers) >= 0
    assert max(numbers) <= 240


def test_a_chunk_of_one_step_is_what_is_executed_and_not_drawn_again(evaluated):
    chunks = np.arange(6, dtype=float).reshape(3, 1, 2)
    assert plot_actions(chunks[:, 0], np.arange(3), chunks).count("<polyline") == 2
    assert "chunks in orange" in write_report(evaluated).read_text()
    for seed in range(3):
        np.savez(
            evaluated / f"videos/policy_reach_{seed}.npz",
            actions=chunks[:, 0],
            queries=np.arange(3),
            chunks=chunks,
        )
    assert "chunks in orange" not in write_report(evaluated).read_text()


def test_a_plot_survives_a_dimension_that_never_moves():
    svg = plot_actions(np.zeros((1, 2)), np.array([0]), np.zeros((1, 4, 2)))
    assert "nan" not in svg


PROBE = """<script>
addEventListener('load', async () => {
  const videos = [...document.querySelectorAll('video')];
  await Promise.all(videos.map(v => new Promise(done => v.readyState >= 2 ? done() : (v.onloadeddata = done, v.onerror = done, v.load()))));
  const p = document.createElement('p');
  p.id = 'probe';
  p.textContent = JSON.stringify({
    videos: videos.map(v => [v.videoWidth, Math.round(v.duration * 10) / 10, v.error === null]),
    curves: document.querySelectorAll('svg polyline').length,
    rows: [...document.querySelectorAll('tr')].length,
    wide: document.documentElement.scrollWidth <= innerWidth,
  });
  document.body.append(p);
});
</script>"""


def test_a_real_browser_shows_the_report(evaluated, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; `make browser` installs it where it may")
    page = write_report(evaluated).read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page + PROBE)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    command = [
        browser,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        "--timeout=60000",
        "--dump-dom",
        probed.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<p id="probe">(.*?)</p>', result.stdout)
    assert found, result.stderr[-2000:]
    seen = json.loads(found.group(1))
    assert seen == {
        "videos": [[32, 1, True]] * 3,
        "curves": 3 * 2 * (5 + 1),
        "rows": 3,
        "wide": True,
    }


@pytest.mark.parametrize(
    "video",
    ["../secret.mp4", "/etc/passwd", "videos/../../secret.mp4", "videos/secret.txt", "secret.mp4"],
)
def test_a_report_shows_no_file_from_elsewhere(evaluated, video):
    (evaluated.parent / "secret.mp4").write_bytes(b"secret")
    log = evaluated / "episodes.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["video"] = video
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="videos in"):
        write_report(evaluated)
