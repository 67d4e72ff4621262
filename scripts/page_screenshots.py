"""Take the screenshots of the chat page that the documents show.

    python scripts/page_screenshots.py http://127.0.0.1:8000 docs/images

Needs a running `linnet serve` with a model that can do the page's examples, the package playwright,
and Debian's Chromium. `--only` takes some of them; those called start need no such model.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
ANSWER_MS = 120_000


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server")
    parser.add_argument("folder", type=Path, help="for the images")
    parser.add_argument("--only", nargs="+", choices=SHOTS, default=list(SHOTS))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name in arguments.only:
            page = SHOTS[name](browser, arguments.url)
            page.wait_for_timeout(400)  # for what fades
            page.screenshot(path=arguments.folder / f"page-{name}.png")
            page.context.close()
        browser.close()


def light(browser: Browser, url: str) -> Page:
    """Recall from a long text, and another question that finds it in the cache."""
    page = opened(browser, url, color_scheme="light", **DESKTOP)
    try_example(page, "Recall a fact")
    page.fill("#message", "Tell me the secret code of the amber lantern.")
    page.keyboard.press("Enter")
    wait_for_answer(page, 2)
    page.locator("#message").focus()
    return page


def dark(browser: Browser, url: str) -> Page:
    """A tool call with its result."""
    page = opened(browser, url, color_scheme="dark", **DESKTOP)
    try_example(page, "Call a tool")
    box = page.locator(".call-box textarea")
    if box.is_visible():
        box.fill('{"sky": "sunny", "temperature": 12}')
        page.click("text=Send the result")
        wait_for_answer(page, 2)
    return page


def phone(browser: Browser, url: str) -> Page:
    """A sum with its thoughts open, on a phone."""
    page = opened(browser, url, color_scheme="dark", device_scale_factor=1.5, **PHONE)
    try_example(page, "Do a sum")
    thinking = page.locator(".answer").last.locator(".thinking")
    if thinking.is_visible():
        thinking.locator("summary").click()
    return page


def start(browser: Browser, url: str) -> Page:
    """What a newcomer sees."""
    return opened(browser, url, color_scheme="light", **DESKTOP)


def phone_start(browser: Browser, url: str) -> Page:
    """What a newcomer sees on a phone."""
    return opened(browser, url, color_scheme="dark", device_scale_factor=1.5, **PHONE)


SHOTS = {
    "start": start,
    "phone-start": phone_start,
    "light": light,
    "dark": dark,
    "phone": phone,
}


def opened(browser: Browser, url: str, **options) -> Page:
    """Return the page in a new browser, with greedy sampling."""
    page = browser.new_context(**options).new_page()
    page.goto(url)
    expect(page.locator("#badge")).to_have_attribute("data-state", "ok")
    page.click("#toggle-settings")
    page.fill("#temperature", "0")
    page.click("[aria-label='Close the settings']")
    page.locator("#message").focus()
    return page


def try_example(page: Page, title: str) -> None:
    """Send an example of the empty chat."""
    page.click(f".example:has-text('{title}')")
    page.wait_for_timeout(800)  # until its tokens are counted
    page.click("#send")
    wait_for_answer(page, 1)


def wait_for_answer(page: Page, count: int) -> None:
    """Wait until there are so many answers, and the last one is complete."""
    expect(page.locator(".answer")).to_have_count(count)
    expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false", timeout=ANSWER_MS)


if __name__ == "__main__":
    main()
