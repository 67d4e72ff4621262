// A think span, folded, with its count of tokens.

import { h, icon } from "./dom.js";
import { isThinking } from "./answer.js";
import { duration, plural } from "./format.js";
import { GrowingText } from "./growing_text.js";

export class ThinkingView {
  #label = h("span");
  #body = h("div.thinking-text", { tabIndex: 0 });
  #text = new GrowingText(this.#body);

  constructor() {
    this.element = h(
      "details.thinking",
      { hidden: true },
      h("summary", {}, icon("thought"), this.#label, icon("chevron")),
      this.#body,
    );
  }

  /** @param {import("./answer.js").Answer} answer */
  show(answer) {
    this.element.hidden = !answer.reasoning;
    if (!answer.reasoning) return;
    const isLive = isThinking(answer);
    const tokens = plural(answer.stats.reasoningTokens, "token");
    this.element.classList.toggle("live", isLive);
    this.#label.textContent = isLive
      ? `Thinking · ${tokens}`
      : `Thought · ${tokens} · ${duration(answer.thinkingMs / 1000)}`;
    const body = this.#body;
    const isAtEnd = body.scrollHeight - body.scrollTop - body.clientHeight < 24;
    this.#text.show(answer.reasoning.trimStart());
    if (isLive && isAtEnd) body.scrollTop = body.scrollHeight;
  }
}
