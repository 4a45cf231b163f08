"""What a reader sees, measured in a real browser: nothing is cut, nothing overlaps, both themes show."""

import html
import json
import re
import shutil
import subprocess

import pytest

from penult.report.palette import THEMES

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = [1280, 768, 360, 320]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic --window-size=1400,1000"
).split()

MEASURE = """
function measure(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, cut = [], outside = [], overlapping = [];
  for (const each of page.querySelectorAll("body *")) {
    const style = view.getComputedStyle(each);
    if (["hidden", "clip"].includes(style.overflowX) && each.scrollWidth > each.clientWidth + 1)
      cut.push(each.tagName + " " + each.textContent.slice(0, 40));
  }
  let charts = 0, smallest = 99;
  for (const chart of page.querySelectorAll("svg.chart")) {
    const edge = chart.getBoundingClientRect();
    if (!edge.width) continue;
    charts += 1;
    const texts = [...chart.querySelectorAll("text")].filter(text => text.textContent.trim());
    const boxes = texts.map(text => text.getBoundingClientRect());
    texts.forEach((text, i) => {
      const box = boxes[i], name = text.textContent + " in " + chart.getAttribute("aria-label");
      smallest = Math.min(smallest, parseFloat(view.getComputedStyle(text).fontSize) * edge.width /
        chart.viewBox.baseVal.width);
      if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.top < edge.top - 1 ||
          box.bottom > edge.bottom + 1) outside.push(name);
      if (text.hasAttribute("transform")) return;
      for (let j = 0; j < i; j++) {
        const other = boxes[j];
        const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const down = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (!texts[j].hasAttribute("transform") && across > 1 && down > 0.35 * box.height)
          overlapping.push(texts[j].textContent + " and " + name);
      }
    });
  }
  const line = page.querySelector('path[style*="--series-1,"][style*="fill:none"]');
  return {
    width: view.innerWidth, content: page.documentElement.scrollWidth,
    cut, outside, overlapping, charts, smallest,
    paper: view.getComputedStyle(page.body).backgroundColor, ink: view.getComputedStyle(page.body).color,
    series: view.getComputedStyle(line).stroke,
  };
}
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.body.textContent = "found" + JSON.stringify(found) + "end";
};
"""


def seen(page, theme, folder):
    document = html.escape(page.html())
    frame = '<iframe style="border:0;height:900px;width:{}px" srcdoc="{}"></iframe>'
    frames = [frame.format(width, document) for width in WIDTHS]
    host = folder / "host.html"
    host.write_text(f"<!doctype html><body>{''.join(frames)}<script>{MEASURE}</script>", encoding="utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    command = [BROWSER, *FLAGS, *dark, f"--user-data-dir={folder / 'profile'}", "--dump-dom", host.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return json.loads(html.unescape(re.search(r"found(.*)end", dom, re.DOTALL)[1]))


def rgb(colour):
    return "rgb({}, {}, {})".format(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("theme", THEMES)
def test_nothing_is_cut_in_either_theme_at_any_width(sample, theme, tmp_path):
    for found, width in zip(seen(sample, theme, tmp_path), WIDTHS, strict=True):
        assert found["width"] == width
        assert found["content"] <= width
        assert found["cut"] == []
        assert found["outside"] == []
        assert found["overlapping"] == []
        assert found["charts"] == 10
        assert found["smallest"] >= 8.5
        assert found["paper"] == rgb(THEMES[theme]["paper"])
        assert found["ink"] == rgb(THEMES[theme]["ink"])
        assert found["series"] == rgb(THEMES[theme]["series-1"])
