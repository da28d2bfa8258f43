"""The page of a plan and of a diff, as a person uses it: opened in headless Chromium, filtered, unfolded, by keyboard.

Needs `pip install playwright` and a Chromium (`chromium` on the PATH, or the path in CHROMIUM; Debian: `apt-get install
chromium`). `python tests/live/check_page.py [FOLDER]` leaves pages and screenshots, light and dark, in the folder.
"""

import os
import pathlib
import shutil
import sys
import tempfile

import jax
import numpy as np
from playwright.sync_api import Page, expect, sync_playwright

import portax
from portax.analysis import cards, html_page
from portax.config.shipped import config_path
from portax.layouts import HuggingFace, TpuInference
from portax.testing.golden import Tree

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NASTY = "base/decoder/<script>ran=1</script><img src=x onerror=ran=1>"


def plan(model, layout, **options):
    converter = portax.converter_for(config_path(model), layout=layout)
    params = converter.expected_tree(**options)
    return cards.of_plan(converter.plan(params), params, what=model)


def failing():
    tree = Tree.load(GOLDEN / "qwen3-30b-a3b.scan" / "source.json")
    params = dict(tree.shapes)
    del params["base/decoder/decoder_norm/scale"]
    params[NASTY] = jax.ShapeDtypeStruct((3, 4), np.float32)
    wrong = "base/decoder/layers/moe_block/wi_0"
    params[wrong] = jax.ShapeDtypeStruct((*params[wrong].shape[:-1], 7), np.float32)
    try:
        portax.converter_for(tree.config, layout=TpuInference(version="0.32", tp=2)).plan(params)
    except portax.PlanError as error:
        return cards.of_plan(error.plan, params, what="a broken tree", problems=error.problems)
    raise AssertionError("the broken tree was planned")


def difference():
    a = Tree.load(GOLDEN / "qwen3-8b.unscan" / "source.json").fill()
    b = {path: leaf.copy() for path, leaf in a.items()}
    b["base/decoder/layers_2/mlp/wo/kernel"][0] = np.nan
    b["base/decoder/layers_0/mlp/wo/kernel"] += 1
    b["base/decoder/layers_1/mlp/wo/kernel"] = b["base/decoder/layers_1/mlp/wo/kernel"].astype(np.float16)
    del b["base/decoder/layers_3/mlp/wi_0/kernel"]
    b["base/decoder/layers_3/extra"] = np.ones(3, np.float32)
    return cards.of_diff(portax.diff(a, b))


def filtered(page: Page, text: str, count: str) -> None:
    page.keyboard.press("Escape")
    page.locator("#search").blur()
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type(text)
    expect(page.locator("#count")).to_have_text(count)


def check_moe(page: Page) -> None:
    expect(page.locator("#count")).to_have_text("1,980 leaves")
    filtered(page, "layers.17. W13", "1 leaf in 1 card, of 1,980")
    expect(page.locator(".side.right .card:visible")).to_have_count(1)
    expect(page.locator(".side.left .card:visible")).to_have_count(2)
    expect(page.locator("section.section:visible")).to_have_count(1)
    expect(page.locator("path:visible")).to_have_count(2)
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.tagName") != "SUMMARY" or not page.evaluate(
        "document.activeElement.textContent.includes('w13')"
    ):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    member = page.locator(".card[open] li")
    expect(member).to_have_count(1)
    expect(member).to_contain_text("layers.17.mlp.experts.routed_experts.w13_weight")
    expect(member).to_contain_text("decoder/layers_17/moe_block/wi_0")
    filtered(page, "no such leaf", "0 leaves in 0 cards, of 1,980")
    expect(page.get_by_text("No leaf is like that.")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#count")).to_have_text("1,980 leaves")


def check_experts(page: Page) -> None:
    filtered(page, "experts.127.gate_proj layers.93.", "1 leaf in 1 card, of 38,076")
    filtered(page, "experts", "36,096 leaves in 3 cards, of 38,076")
    page.locator("summary", has_text="gate_proj").click()
    expect(page.locator(".card[open] li")).to_have_count(100)
    page.get_by_role("button", name="show 100 more of 11,932").click()
    expect(page.locator(".card[open] li")).to_have_count(200)


def check_failing(page: Page) -> None:
    expect(page.locator("#problems li")).to_have_count(3)
    expect(page.get_by_text(NASTY).first).to_be_visible()
    page.get_by_role("button", name="problems").click()
    expect(page.locator(".card.bad:visible, .card.ghost:visible")).to_have_count(4)
    expect(page.locator(".card.fed")).to_have_count(1)
    page.get_by_role("button", name="base/decoder/layers/moe_block/wi_0").click()
    expect(page.locator(".card.bad", has_text="wi_0")).to_be_focused()
    assert page.title() == "portax plan a broken tree"
    assert page.evaluate("window.ran === undefined")


def check_diff(page: Page) -> None:
    expect(page.locator("#count")).to_have_text("48 leaves")
    page.get_by_role("button", name="differences").click()
    expect(page.locator("#count")).to_have_text("5 leaves in 4 cards, of 48")
    expect(page.get_by_text("NaNs: 0 in A, 128 in B")).to_be_visible()
    expect(page.get_by_text("largest 1", exact=True)).to_be_visible()
    expect(page.get_by_role("heading", name="equal")).to_be_hidden()


PAGES = {
    "dense": (lambda: plan("qwen3-8b", TpuInference(version="0.32", tp=4)), lambda page: None),
    "moe": (lambda: plan("qwen3-235b-a22b", TpuInference(version="0.32", tp=8), scanned=False), check_moe),
    "experts": (lambda: plan("qwen3-235b-a22b", HuggingFace(), scanned=False), check_experts),
    "failing": (failing, check_failing),
    "diff": (difference, check_diff),
}


def main() -> None:
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        sys.exit("no Chromium: put one on the PATH, or its path in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name, (drawn, check) in PAGES.items():
            file = folder / f"{name}.html"
            html_page.write(file, drawn())
            for scheme, width in (("light", 1400), ("dark", 1400), ("light", 480)):
                page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 1000})
                said: list[str] = []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, said=said: said.append(request.url))
                page.goto(file.as_uri())
                page.screenshot(path=folder / f"{name}.{scheme}.{width}.png", full_page=True)
                if width > 1000:
                    check(page)
                over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert over <= 0, f"{name} is {over} pixels too wide at {width}"
                assert said == [file.as_uri()], f"{name}: asked for or complained of {said}"
                page.close()
            sys.stdout.write(f"{name}: {file.stat().st_size} bytes, as it should be\n")
        browser.close()
    sys.stdout.write(f"screenshots in {folder}\n")


if __name__ == "__main__":
    main()
