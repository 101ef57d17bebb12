"""How the page looks at every stage: on a desktop and on a phone, light and dark. And how it sounds and is reached."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed"),
]

#: What is on the page that has less contrast than asked with what lies behind it: letters, and lines of the plot.
FAINT = """
const [least] = arguments;
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
};
const over = (top, bottom, alpha = top[3]) => [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * bottom[i]);
const background = (element) => {
    if (!element) return [255, 255, 255];
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour : over(colour, background(element.parentElement));
};
const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const opacity = (element) => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;
const faint = [];
let seen = 0;
const check = (element, colour, text) => {
    const behind = background(element), top = parse(colour);
    const [a, b] = [over(top, behind, top[3] * opacity(element)), behind].map(luminance);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen++;
    if (contrast < least) faint.push(`${contrast.toFixed(2)}: ${text} (${element.getAttribute("class")})`);
};
for (const element of document.querySelectorAll(".gradio-container *")) {
    if (!element.checkVisibility({visibilityProperty: true}) || element.closest("style, script")) continue;
    const style = getComputedStyle(element);
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join(" ").trim();
    const isText = text && parseFloat(style.fontSize) > 0 && element.getBoundingClientRect().width > 0;
    if (isText) check(element, element.closest("svg") ? style.fill : style.color, text);
    for (const part of ["::before", "::after"]) {
        const {content, color, fontSize} = getComputedStyle(element, part);
        if (/^"[^"]*[^\\s"]/.test(content) && parseFloat(fontSize) > 0) check(element, color, content);
    }
    const isLine = element.matches("#status svg :is(path, line, use)") && !element.closest("defs");
    if (isLine && style.stroke !== "none") check(element, style.stroke, "a line of the plot");
}
return [seen, [...new Set(faint)]];
"""

TOO_WIDE = """return [...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && e.checkVisibility())
    .map((e) => e.tagName + "." + e.className + " " + e.getBoundingClientRect().right)"""


#: Whether the page has the colour scheme, and no colour is on its way to another.
HAS_SETTLED = """return document.body.matches(".dark") === arguments[0]
    && !document.getAnimations().some((a) => a instanceof CSSTransition && a.playState === "running")"""


def look(page, stage: str, folder) -> None:
    """Take a picture of the page in every appearance, and measure it."""
    for width, height in ((1280, 900), (390, 844)):
        for dark in (False, True):
            page.appear(width, height, dark=dark)
            page.wait(lambda dark=dark: page.browser.execute_script(HAS_SETTLED, dark))
            name = f"{stage}-{width}-{'dark' if dark else 'light'}"
            page.shoot(folder / f"{name}.png")
            n_seen, faint = page.browser.execute_script(FAINT, 4.5)
            assert n_seen > 20, name
            assert faint == [], name
            assert page.browser.execute_script(TOO_WIDE) == [], name
            assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width, name


def test_every_stage_can_be_read(open_page, tmp_path):
    page = open_page()
    look(page, "empty", tmp_path)
    page.alert("adapt", "status")
    look(page, "error", tmp_path)
    page.press("example")
    page.wait(lambda: len(page.all(".thumbnail-item")) == 70)
    assert {picture.size["width"] >= 72 for picture in page.all(".thumbnail-item")} == {True}
    look(page, "example", tmp_path)
    message = page.message("adapt", "status")
    assert "10 classes from 50 images" in message
    assert "classified by means of the others" in message
    assert not page.all("#status svg")[0].is_displayed()
    page.click("#status summary")
    assert page.wait(lambda: page.all("#status svg"))[0].size["width"] > 200
    look(page, "adapted", tmp_path)
    page.click("#status summary")
    assert "of 20 right before," in page.message("predict", "results")
    assert len(page.predictions()) == 20
    look(page, "classified", tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 5 * 4

    page.appear(390, 844)
    controls = [c for c in page.all("input, textarea, select, button, [role=button]") if c.is_displayed()]
    names = [control.accessible_name for control in controls]
    assert len(names) > 50
    assert all(names)
    boxes = [c.accessible_name for c in controls if c.tag_name in ("input", "textarea")]
    assert boxes == [f"Name of class {i}" for i in range(1, 11)]
    for gallery in (*(f"Images of class {i}" for i in range(1, 11)), "New images"):
        assert f"{gallery}: Choose images" in names
    assert {f"Remove class {i}" for i in range(1, 11)} <= set(names)
    assert {"Adapt", "Predict", "Start again", "Download the PEFT adapter (zip)"} <= set(names)
    assert "Right class of new-9-2.png" in names
    images = page.all(".hf-results img")
    assert [image.accessible_name for image in images[:2]] == ["new-0-1.png", "new-0-2.png"]


def test_keyboard_alone(open_page, browser):
    page = open_page()
    seen = []
    focused = browser.switch_to.active_element
    for _ in range(40):
        focused.send_keys("\ue004")  # Tab
        focused = browser.switch_to.active_element
        seen.append(focused.accessible_name)
        if seen[-1] == "Name of class 1":
            focused.send_keys("red")
        if seen[-1] == "Adapt":
            focused.send_keys("\ue007")  # Enter
            break
    order = ["Name of class 1", "Images of class 1: Choose images", "Name of class 2", "Adapt"]
    assert [name for name in seen if name in order] == order
    page.wait(lambda: "Class 'red' has no images" in page.text())
