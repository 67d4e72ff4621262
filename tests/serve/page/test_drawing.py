"""What the chat page draws: safely, as it comes, in its place, on any screen."""

import json
import time

import pytest
from playwright.sync_api import expect

WEATHER = json.dumps([{"name": "get_weather", "parameters": {"type": "object"}}])


ATTACKS = """\
<script>window.ran = 1</script> <img src=x onerror="window.ran = 2"> [link](javascript:window.ran=3)
![picture](https://example.com/a.png) [data](data:text/html,<script>window.ran=4</script>)

<iframe src="javascript:parent.ran = 5"></iframe>

<a href="javascript:window.ran = 6" onclick="window.ran = 7">click</a> <svg onload="window.ran = 8">
<style>body { display: none }</style> <form action="https://example.com"><button>go</button></form>
<div id="message" class="toast" style="position: fixed">over</div> <base href="https://example.com">

```<img src=x onerror="window.ran = 9">
</code></pre><img src=x onerror="window.ran = 10">
```

| <img src=x onerror="window.ran = 11"> | [x](vbscript:1) |
|---|---|
| <math><mtext></form><form><mglyph><style></math><img src onerror="window.ran = 12"> | `</td>` |
"""


def test_nothing_runs_that_a_model_says(speak):
    calls = json.dumps(
        {"name": "<img src=x onerror='window.ran = 13'>", "arguments": {"a": ATTACKS}}
    )
    page, _ = speak(
        f"<think>\n{ATTACKS}</think>\n{ATTACKS}", f"<tool_calls>\n{calls}\n</tool_calls>", cut=5
    )
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.ask(ATTACKS)
    page.click("#toggle-settings")
    page.fill("#tools", WEATHER)
    page.ask(ATTACKS)
    page.reload()
    page.answer()
    assert page.evaluate("window.ran") is None
    assert not [url for url in requests if "example.com" in url or url.endswith("/x")]
    expect(
        page.locator("#thread :is(script, img, iframe, svg[onload], style, base)")
    ).to_have_count(0)
    links = page.locator("#thread a[href]").evaluate_all("links => links.map(link => link.href)")
    assert links == ["https://example.com/a.png"]
    assert page.locator("#thread [style], #thread [id]").count() == 0


MARKDOWN = """\
# Title

Some *text* with `code`, **more**
and a [link](https://example.com).

1. one
   - nested

     far
2. two

```python
def f():
    return "```"
```
* a
* b
~~~
plain

~~~
> quote
> > deeper

| a | b |
|--:|---|
| 1 | 2 |

Setext
======
- [x] done

    indented

---
last line"""


def test_streamed_markdown_is_what_the_whole_would_be(page):
    drawn = page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("/js/markdown_view.js");
            const draw = (cuts) => {
                const element = document.createElement("div");
                const view = new MarkdownView(element);
                for (const cut of cuts) view.show(text.slice(0, cut), false);
                while (!view.show(text, true));
                return element.innerHTML.replace(/\\n+(?=<|$)/g, "");
            };
            const all = Array.from(text, (_, index) => index);
            const cuts = [all, ...all.map((index) => [index])];
            for (const rest of [0, 1, 2, 3, 4, 5, 6])
                cuts.push(all.filter((index) => index % 7 === rest));
            return [draw([]), [...new Set(cuts.map(draw))]];
        }""",
        MARKDOWN,
    )
    whole, streamed = drawn
    assert streamed == [whole]
    for tag in ("<h1>", "<ol>", "<figure", "<blockquote>", "<table>", 'type="checkbox"', "<hr>"):
        assert tag in whole


@pytest.mark.slow
def test_reader_who_scrolls_up_is_left_alone(speak, until):
    page, _ = speak("A line of text.\n\n" * 400, cut=40, pause_s=0.02)
    page.send("go on")
    scroller = page.locator("#scroller")
    distance = "area => area.scrollHeight - area.scrollTop - area.clientHeight"
    until(lambda: scroller.evaluate("area => area.scrollTop") > 300)
    assert scroller.evaluate(distance) < 60
    page.mouse.move(640, 300)
    page.mouse.wheel(0, -200)
    expect(page.locator("#to-end")).to_be_visible()
    top = scroller.evaluate("area => area.scrollTop")
    time.sleep(0.3)
    assert scroller.evaluate("area => area.scrollTop") == top
    assert scroller.evaluate(distance) > 150
    page.click("#to-end")
    page.answer()
    assert scroller.evaluate(distance) < 2


@pytest.mark.slow
def test_what_is_drawn_stays_in_its_place(speak):
    page, _ = speak(MARKDOWN, cut=6, pause_s=0.02)
    page.evaluate(
        """() => {
            window.shifts = [];
            new PerformanceObserver((list) => {
                for (const { value, hadRecentInput } of list.getEntries())
                    if (!hadRecentInput) window.shifts.push(value);
            }).observe({ type: "layout-shift", buffered: false });
        }"""
    )
    page.ask("write")
    assert sum(page.evaluate("window.shifts")) < 0.05


PARAGRAPHS = "Some *text* with `code` and a [link](https://example.com).\n" * 10 + "\n"


@pytest.mark.slow
def test_page_answers_while_it_draws_half_a_megabyte(speak):
    text = (MARKDOWN + "\n\n" + PARAGRAPHS * 10) * 65 + "```\n" + "code\n" * 20_000 + "```\n"
    assert len(text) > 500_000
    page, _ = speak(text, cut=20_000)
    page.send("write")
    page.locator(".markdown h1").nth(20).wait_for(state="attached")
    page.fill("#message", "meanwhile")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true", timeout=1)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false", timeout=240_000)
    assert page.locator(".markdown h1").count() == 130
    expect(page.locator("#message")).to_have_value("meanwhile")


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [PARAGRAPHS, "word ", "- item\n", "> quote\n", "| a | b |\n", "**a ", "[a](", "`"],
    ids=["paragraphs", "words", "list", "quote", "table", "stars", "links", "ticks"],
)
def test_drawing_takes_time_in_proportion_to_length(page, unit):
    times = page.evaluate(
        """async (unit) => {
            const { MarkdownView } = await import("/js/markdown_view.js");
            const time = (length) => {
                const text = "```\\n" + "code\\n".repeat(1000) + "```\\n" +
                    unit.repeat(length / unit.length);
                const view = new MarkdownView(document.createElement("div"));
                const start = performance.now();
                for (let end = 0; end < text.length; end += 5000)
                    view.show(text.slice(0, end), false);
                while (!view.show(text, true));
                return performance.now() - start;
            };
            const best = (length) => Math.min(time(length), time(length));
            time(50_000);
            return [best(100_000), best(400_000)];
        }""",
        unit,
    )
    assert times[1] < 10 * times[0]  # 4 times the length; 16 if each step began anew


@pytest.mark.slow
def test_page_fits_a_phone(speak):
    page, _ = speak(MARKDOWN, viewport={"width": 360, "height": 640})
    page.ask("w" * 400)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#toggle-sidebar")
    expect(page.locator("#sidebar")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    for control in page.locator("button:visible").all():
        box = control.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360


@pytest.mark.slow
def test_every_control_has_a_name_and_can_be_reached(page):
    page.ask("the cat")
    page.click("#toggle-settings")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, summary")]
            .filter((control) => control.checkVisibility() && !control.ariaLabel)
            .filter((control) => !control.labels?.length && !control.innerText)
            .map((control) => control.outerHTML)"""
    )
    assert unnamed == []
    expect(page.locator("#announcer")).to_contain_text("complete")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    page.locator("#message").blur()
    page.keyboard.press("/")
    expect(page.locator("#message")).to_be_focused()


@pytest.mark.slow
def test_theme_follows_the_system_until_it_is_chosen(open_page, address):
    page = open_page(address, color_scheme="dark")
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate(background) == light
