"""The page in a real browser: figures, switches, sorting, gallery, keyboard, colours, print, and no network."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from alignbench.report.curves import DARK, LIGHT
from alignbench.report.data import AXES
from alignbench.report.page import build
from tests.report.synthetic import HASHES, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip
ATTACK = "a=<script>document.title='attacked'</script>"
PROMPT = "<script>document.title='attacked'</script> & a <b>red</b> circle"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")


def name_the_prompts(folder: Path) -> None:
    """Give the grids of a run a scores file with a prompt that looks like markup."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    (folder / "scores.json").write_text(json.dumps({"grid": [{"id": "p", "prompt": PROMPT}]}))
    for row in rows:
        row["scores"] = "scores.json"
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for method in ("diffusion_nft", "flow_grpo"):
        for seed in range(2):
            write_run(root, method, seed=seed, grids=seed == 0)
    write_run(root, "flow_grpo", seed=8, variant=ATTACK, status="failed", message=ATTACK, until=0.3, grids=False)
    name_the_prompts(root / "first/shapes/geneval/diffusion_nft/seed0")
    build([root], root / "report", lambda _: None)
    return root / "report"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, report: Path) -> Iterator[webdriver.Chrome]:
    """The page as it is opened; whatever a test does with it, the console has nothing to say."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.get_log("browser")
    browser.get((report / "index.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def draw_all(page: webdriver.Chrome) -> list[WebElement]:
    """Bring every figure to the screen, as reading to the end does; returns the figures."""
    figures = page.find_elements(By.CSS_SELECTOR, "figure[data-figure]")
    for figure in figures:
        page.execute_script("arguments[0].scrollIntoView()", figure)
        WebDriverWait(page, 20).until(lambda _, each=figure: each.find_elements(By.CSS_SELECTOR, ".chart .legend"))
    return figures


def opening(page: webdriver.Chrome) -> WebElement:
    """The figure of the first screen, drawn."""
    figure = page.find_element(By.CSS_SELECTOR, "#answer figure")
    WebDriverWait(page, 20).until(lambda _: figure.find_elements(By.CSS_SELECTOR, ".chart .legend"))
    return figure


def traces(page: webdriver.Chrome, figure: WebElement) -> list[dict[str, Any]]:
    """What plotly draws in a figure: the data of every trace."""
    code = """return arguments[0].querySelector(".chart").data.map(function (trace) {
        return {x: Array.from(trace.x), y: Array.from(trace.y), name: trace.name, meta: trace.meta,
                customdata: trace.customdata, colour: (trace.line || {}).color}; })"""
    found: list[dict[str, Any]] = page.execute_script(code, figure)
    return found


def choose(page: webdriver.Chrome, axis: str) -> None:
    page.find_element(By.CSS_SELECTOR, f"#curves input[value={axis}]").send_keys(Keys.SPACE)


def test_the_plotted_values_are_those_of_the_tables_after_every_switch(page: webdriver.Chrome, report: Path) -> None:
    draw_all(page)
    means, every = (pd.read_csv(report / f"tables/{name}.csv") for name in ("curves", "evaluations"))
    every = every[every["protocol_hash"] == HASHES["curve"]].sort_values(["seed", "fraction"], kind="stable")
    for axis in AXES:
        choose(page, axis.key)
        figures = page.find_elements(By.CSS_SELECTOR, "#curves figure")
        for figure, metric in zip(figures, ("reward", "geneval", "exact_scene"), strict=True):
            scale, drawn = page.execute_script("return arguments[0].chart.scale", figure), traces(page, figure)
            for trace in drawn:
                label = unescape(trace["name"])
                plotted = means.query("axis == @axis.key and method == @label and metric == @metric")
                runs = every.query("method == @label")
                points = [point for point in zip(trace["x"], trace["y"], strict=True) if point[0] is not None]
                costs, scores = [x * scale for x, _ in points], [y for _, y in points]
                if trace["meta"]["kind"] == "mean":
                    assert costs == pytest.approx(plotted["cost"].tolist(), rel=1e-9)
                    assert scores == pytest.approx(plotted["mean"].tolist(), rel=1e-12)
                elif trace["meta"]["kind"] == "band":
                    assert scores == pytest.approx([*plotted["high"], *plotted["low"][::-1]], rel=1e-12)
                elif trace["meta"]["kind"] == "runs":
                    assert costs == pytest.approx(runs[f"cost_{axis.key}"].tolist(), rel=1e-4)
                    assert scores == pytest.approx(runs[metric].tolist(), rel=1e-4)
                elif trace["meta"]["kind"] == "base":
                    assert scores == pytest.approx([*plotted["mean"]] * 2, rel=1e-12)
            kinds = [trace["meta"]["kind"] for trace in drawn]
            assert [kinds.count(kind) for kind in ("mean", "band", "runs", "base")] == [2, 2, 3, 2]
            label = figure.find_element(By.CSS_SELECTOR, ".chart").get_attribute("aria-label")
            assert f"against {axis.title.lower()}" in str(label)
    points = pd.read_csv(report / "tables/hacking.csv")
    paths = [t for figure in page.find_elements(By.CSS_SELECTOR, "#hacking figure") for t in traces(page, figure)]
    values = [y for trace in paths if trace["meta"]["kind"] == "runs" for y in trace["y"] if y is not None]
    assert sorted(values) == pytest.approx(sorted(points["value"]), rel=1e-4)


def test_values_are_listed_below_a_figure_and_follow_the_switch(page: webdriver.Chrome, report: Path) -> None:
    figure = page.find_element(By.CSS_SELECTOR, "#curves figure")
    page.execute_script("arguments[0].scrollIntoView()", figure)
    WebDriverWait(page, 20).until(lambda _: figure.find_elements(By.CSS_SELECTOR, ".values summary"))
    figure.find_element(By.CSS_SELECTOR, ".values summary").send_keys(Keys.ENTER)
    means = pd.read_csv(report / "tables/curves.csv").query("metric == 'reward' and method == 'flow_grpo'")
    for axis in (AXES[0], AXES[4]):
        choose(page, axis.key)
        WebDriverWait(page, 20).until(lambda _: figure.find_elements(By.CSS_SELECTOR, ".values tbody tr"))
        cells = page.execute_script(
            "return Array.from(arguments[0].querySelectorAll('.values tbody tr')).map(function (row) {"
            "return Array.from(row.cells).map(function (cell) { return cell.innerText; }); })", figure
        )  # fmt: skip
        scale = page.execute_script("return arguments[0].chart.scale", figure)
        wanted = means.query("axis == @axis.key")
        listed = [row for row in cells if row[0] == "flow_grpo"]
        assert [float(row[2]) * scale for row in listed] == pytest.approx(wanted["cost"].tolist(), rel=1e-4)
        assert [float(row[3]) for row in listed] == pytest.approx(wanted["mean"].tolist(), rel=1e-3)
        assert listed[-1][1] == "mean of 2 runs"
        limits = [float(limit) for limit in re.findall(r"[-\d.]+", listed[-1][4])]
        assert limits == pytest.approx([wanted["low"].iloc[-1], wanted["high"].iloc[-1]], rel=1e-3)


def test_hovering_says_method_seed_and_values(page: webdriver.Chrome) -> None:
    figure = opening(page)
    mean = next(i for i, trace in enumerate(traces(page, figure)) if trace["meta"]["kind"] == "mean")
    marker = figure.find_elements(By.CSS_SELECTOR, ".trace .point")[13]  # the last of the first method's mean
    ActionChains(page).move_to_element(marker).perform()
    text = WebDriverWait(page, 20).until(lambda _: figure.find_element(By.CSS_SELECTOR, ".hovertext").text)
    assert "diffusion_nft, mean of 2 runs [" in text
    assert "Compute (TFLOP): 20" in text
    place = figure.find_element(By.CSS_SELECTOR, ".chart")
    page.execute_script("Plotly.Fx.hover(arguments[0], [{curveNumber: arguments[1], pointNumber: 3}])", place, mean - 2)
    assert "diffusion_nft, seed 0" in figure.find_element(By.CSS_SELECTOR, ".hovertext").text


def test_the_slider_changes_the_grids_of_every_method(page: webdriver.Chrome) -> None:
    part = page.find_element(By.CSS_SELECTOR, "#samples .samples")
    strips = part.find_elements(By.CSS_SELECTOR, ".strip")
    assert len(strips) == 2

    def shown() -> list[list[tuple[str, str | None]]]:
        """(picture, share of the budget) of every grid that is displayed, by method."""
        grids = [strip.find_elements(By.CSS_SELECTOR, "figure") for strip in strips]
        return [
            [(each.find_element(By.CSS_SELECTOR, "img").get_attribute("src") or "", each.get_attribute("data-used"))
             for each in figures if each.is_displayed()]
            for figures in grids
        ]  # fmt: skip

    everything = shown()
    slider = part.find_element(By.CSS_SELECTOR, "input[type=range]")
    assert slider.get_attribute("value") == slider.get_attribute("max")
    pictures = []
    for keys, share in (
        ((Keys.HOME,), "0"), ((Keys.ARROW_RIGHT, Keys.ARROW_RIGHT), "20"), ((Keys.END,), "100"),
        ((Keys.ARROW_LEFT,), "90"),
    ):  # fmt: skip
        slider.send_keys(*keys)
        assert part.find_element(By.CSS_SELECTOR, "output").text == f"{share}%"
        for strip, grids in zip(everything, shown(), strict=True):
            assert [used for _, used in grids] == [share]
            assert grids[0] in strip
        pictures.append(shown()[0][0][0])
    assert len(set(pictures)) == 4
    part.find_element(By.CSS_SELECTOR, "button").send_keys(Keys.ENTER)
    assert shown() == everything


def test_tables_are_sorted_by_keyboard(page: webdriver.Chrome) -> None:
    table = page.find_element(By.CSS_SELECTOR, "#verdict table[data-sortable]")
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")

    def column(index: int) -> list[str]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr:not(.group)")
        return [row.find_elements(By.CSS_SELECTOR, "th, td")[index].text.split("\n")[0] for row in rows]

    written = column(0)
    assert written == ["base", "base", "diffusion_nft", "flow_grpo", f"flow_grpo@{ATTACK}"]
    button = heads[2].find_element(By.CSS_SELECTOR, "button")
    button.send_keys(Keys.ENTER)
    assert heads[2].get_attribute("aria-sort") == "descending"
    assert column(0) == written  # the better method is first already, the unfinished one has no number
    button.send_keys(Keys.SPACE)
    assert heads[2].get_attribute("aria-sort") == "ascending"
    assert column(0) == ["base", "base", "flow_grpo", "diffusion_nft", f"flow_grpo@{ATTACK}"]
    numbers = [float(text.replace("−", "-")) for text in column(2)[2:4]]
    assert numbers == sorted(numbers)
    heads[0].find_element(By.CSS_SELECTOR, "button").click()
    assert heads[0].get_attribute("aria-sort") == "ascending"
    assert heads[2].get_attribute("aria-sort") is None
    heads[0].find_element(By.CSS_SELECTOR, "button").click()
    assert column(0) == ["base", "base", f"flow_grpo@{ATTACK}", "flow_grpo", "diffusion_nft"]
    heads[0].find_element(By.CSS_SELECTOR, "button").click()
    assert heads[0].get_attribute("aria-sort") is None
    assert column(0) == written


def test_nothing_is_fetched_and_nothing_is_complained_about(browser: webdriver.Chrome, report: Path) -> None:
    for kind in ("performance", "browser"):
        browser.get_log(kind)
    browser.get((report / "index.html").as_uri())
    draw_all(browser)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [(report / "index.html").as_uri()]


def test_names_and_prompts_stay_text(page: webdriver.Chrome) -> None:
    draw_all(page)
    assert page.title == "alignbench report"
    prompt = page.find_element(By.CSS_SELECTOR, ".prompts li span")
    assert page.execute_script("return arguments[0].textContent", prompt) == PROMPT
    legends = page.find_elements(By.CSS_SELECTOR, "#curves .legendtext")
    assert f"flow_grpo@{ATTACK}" in {legend.get_attribute("textContent") for legend in legends}
    blocked = page.execute_script(
        "var s = document.createElement('script'); s.textContent = 'document.title = \"attacked\"';"
        "document.body.append(s); return document.title;"
    )
    assert blocked == "alignbench report"  # only the page's own scripts may run
    (complaint,) = page.get_log("browser")
    assert "Content Security Policy" in complaint["message"]


def test_the_keyboard_reaches_every_control(page: webdriver.Chrome) -> None:
    draw_all(page)
    page.execute_script("scrollTo(0, 0)")
    code = """
        var all = Array.from(document.querySelectorAll("a[href], button, input, summary, [tabindex]"));
        all = all.filter(function (e) { return e.checkVisibility() && !e.disabled && e.tabIndex >= 0; });
        return all.filter(function (e) { return e.type !== "radio" || e.checked; });"""
    wanted = page.execute_script(code)
    page.execute_script("document.activeElement.blur()")
    page.execute_script("document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(len(wanted) + 5):
        ActionChains(page).send_keys(Keys.TAB).perform()
        reached.append(page.switch_to.active_element.id)
    assert {element.id for element in wanted} <= set(reached)
    radio = page.find_element(By.CSS_SELECTOR, "#curves input:checked")
    radio.send_keys(Keys.ARROW_RIGHT)
    assert page.find_element(By.CSS_SELECTOR, "#curves input:checked").get_attribute("value") == AXES[1].key


def colours(page: webdriver.Chrome) -> tuple[str, str, str]:
    """(background, text, first method's line as drawn)."""
    mean = next(trace for trace in traces(page, opening(page)) if trace["meta"]["kind"] == "mean")
    style = "var s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    return (*page.execute_script(style), mean["colour"])


def luminance(colour: str) -> float:
    channels = (int(value) / 255 for value in re.findall(r"\d+", colour)[:3])
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize(("scheme", "palette"), [("light", LIGHT), ("dark", DARK)])
def test_light_and_dark(page: webdriver.Chrome, scheme: str, palette: tuple[str, ...]) -> None:
    opening(page)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    WebDriverWait(page, 20).until(lambda _: colours(page)[2] == palette[0])
    paper, ink, _ = colours(page)
    dim, bright = sorted((luminance(paper), luminance(ink)))
    assert (bright + 0.05) / (dim + 0.05) > 7
    assert (luminance(paper) < luminance(ink)) == (scheme == "dark")


def test_nothing_runs_out_of_a_narrow_page(page: webdriver.Chrome) -> None:
    width = 390
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        draw_all(page)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_print_shows_static_figures_all_grids_and_no_controls(page: webdriver.Chrome) -> None:
    opening(page)
    choose(page, "nfe")
    page.find_element(By.CSS_SELECTOR, "#samples input[type=range]").send_keys(Keys.HOME)
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 60
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})

    def visible(selector: str) -> list[WebElement]:
        return [each for each in page.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]

    assert not visible("nav, .switch, .slider, .chart, .values")
    assert {each.get_attribute("data-axis") for each in visible("#curves .static > *")} == {"nfe"}
    assert len(visible(".static svg")) == len(page.find_elements(By.CSS_SELECTOR, "figure[data-figure]"))
    assert len(visible("#samples .strip figure")) == len(page.find_elements(By.CSS_SELECTOR, "#samples .strip figure"))
    assert all(each.get_attribute("open") for each in page.find_elements(By.CSS_SELECTOR, "details:not(.values)"))


def test_without_scripts_every_figure_grid_and_axis_is_there(browser: webdriver.Chrome, report: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(f"{(report / 'index.html').as_uri()}#curves")
        svgs = browser.find_elements(By.CSS_SELECTOR, ".static svg")
        assert sum(each.is_displayed() for each in svgs) == len(browser.find_elements(By.CSS_SELECTOR, "figure.plot"))
        ActionChains(browser).send_keys(Keys.TAB, Keys.ARROW_RIGHT).perform()  # from the first axis to the second

        def shown() -> list[WebElement]:
            return [each for each in browser.find_elements(By.CSS_SELECTOR, "[data-axis]") if each.is_displayed()]

        WebDriverWait(browser, 20).until(lambda _: {e.get_attribute("data-axis") for e in shown()} == {AXES[1].key})
        assert all(each.text for each in shown())  # labels of a figure that is really there
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


MANY = ("awm", "diffusion_nft", "dpo", "draft", "flow_grpo", "rwr", "sdpo", "tempflow_grpo")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of eight methods of five runs."""
    root = tmp_path_factory.mktemp("many")
    for method in MANY:
        for seed in range(5):
            write_run(root, method, seed=seed, grids=seed == 0)
    build([root], root / "report", lambda _: None)
    return root / "report"


def emulate(browser: webdriver.Chrome, width: int, height: int, scheme: str = "light", media: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def photograph(browser: webdriver.Chrome, path: Path, whole: bool = False) -> None:
    """Write what is on the screen, or the whole page, to a PNG file."""
    more: dict[str, Any] = {}
    if whole:
        width, height = browser.execute_script(
            "var root = document.documentElement; return [root.clientWidth, root.scrollHeight]"
        )
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        more = {"captureBeyondViewport": True, "clip": clip}
    path.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", more)["data"]))


def test_the_first_screen_has_the_answer_of_eight_methods(
    browser: webdriver.Chrome, many: Path, tmp_path: Path
) -> None:
    """Screenshots for whoever wants to look lie in the folder of the test."""
    try:
        for scheme in ("light", "dark"):
            emulate(browser, 1280, 900, scheme)
            browser.get((many / "index.html").as_uri())
            opening(browser)
            photograph(browser, tmp_path / f"{scheme}.png")
            places = browser.execute_script(
                "return Array.from(document.querySelectorAll(arguments[0])).map(function (each) {"
                "var place = each.getBoundingClientRect(); return [each.localName, place.top, place.bottom]; })",
                "#answer-title, #answer li, #answer thead, #answer tbody tr",
            )
            names = [name for name, _, _ in places]
            assert (names[0], names.count("thead"), names.count("tr")) == ("h2", 1, 2 + len(MANY))
            assert names.count("li") >= 2
            top = places[: names.index("thead") + 1 + 4]  # the base at both guidances, and the first two methods
            assert all(0 <= above < below <= 900 for _, above, below in top), top
        draw_all(browser)
        photograph(browser, tmp_path / "dark_whole.png", whole=True)
        emulate(browser, 390, 844)
        browser.execute_script("scrollTo(0, 0)")
        photograph(browser, tmp_path / "narrow.png")
        photograph(browser, tmp_path / "narrow_whole.png", whole=True)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        emulate(browser, 1123, 794, media="print")
        photograph(browser, tmp_path / "print_whole.png", whole=True)
        written = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
        assert len(set(written.values())) == len(written) == 6
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
