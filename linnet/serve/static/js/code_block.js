// Code with its language's name, a copy button and colors.

import { copyText, h, iconButton } from "./dom.js";
import { GrowingText } from "./growing_text.js";
import { sanitize } from "./sanitize.js";
import bash from "../vendor/highlight/bash.js";
import hljs from "../vendor/highlight/core.js";
import cpp from "../vendor/highlight/cpp.js";
import css from "../vendor/highlight/css.js";
import diff from "../vendor/highlight/diff.js";
import ini from "../vendor/highlight/ini.js";
import javascript from "../vendor/highlight/javascript.js";
import json from "../vendor/highlight/json.js";
import markdown from "../vendor/highlight/markdown.js";
import python from "../vendor/highlight/python.js";
import rust from "../vendor/highlight/rust.js";
import sql from "../vendor/highlight/sql.js";
import xml from "../vendor/highlight/xml.js";
import yaml from "../vendor/highlight/yaml.js";

const LANGUAGES = {
  bash, cpp, css, diff, ini, javascript, json, markdown, python, rust, sql, xml, yaml,
};
for (const [name, grammar] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, grammar);
hljs.registerAliases(["c", "h"], { languageName: "cpp" });
hljs.registerAliases(["typescript", "ts", "tsx"], { languageName: "javascript" });
hljs.registerAliases(["shell", "console"], { languageName: "bash" });

const MAX_COLORED_LEN = 60_000; // characters; coloring more would be felt
const MAX_LIVE_LEN = 8_000; // of code that grows, and so is colored again and again

/** A block of code that can grow. */
export class CodeBlock {
  #code = h("code");
  #plain = new GrowingText(this.#code);
  #language;
  #text = "";

  /** @param {string} language as the fence names it; "" if it does not */
  constructor(language) {
    this.#language = hljs.getLanguage(language) ? language : "";
    const copy = iconButton("copy", "Copy the code", () => copyText(copy, this.#text));
    this.element = h(
      "figure.code",
      {},
      h("figcaption", {}, h("span", {}, language || "text"), copy),
      h("pre", { tabIndex: 0 }, this.#code),
    );
  }

  /** Shows `text`; `isWhole` once it will not grow any more. */
  show(text, isWhole) {
    this.#text = text;
    if (this.#language && text.length <= (isWhole ? MAX_COLORED_LEN : MAX_LIVE_LEN)) {
      this.#code.replaceChildren(colored(text, this.#language));
      this.#plain = null;
      return;
    }
    if (!this.#plain) {
      this.#code.replaceChildren();
      this.#plain = new GrowingText(this.#code);
    }
    this.#plain.show(text);
  }
}

/** @returns {DocumentFragment} */
function colored(text, language) {
  return sanitize(hljs.highlight(text, { language, ignoreIllegals: true }).value);
}
