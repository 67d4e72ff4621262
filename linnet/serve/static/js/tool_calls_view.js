// The tool calls of one answer: a card for each, and a button that sends all results.

import { h } from "./dom.js";
import { ToolCallView } from "./tool_call_view.js";

export class ToolCallsView {
  /** @type {ToolCallView[]} */
  #cards = [];
  #list = h("div.calls-list");
  #send = h("button.primary", { type: "button" });
  #change = h("button.quiet", { type: "button" }, "Change results");
  #isEditing = false;
  #answer;
  #results = [];
  #onSend;

  /** @param {(results: string[]) => void} onSend gets a result for each call, in order */
  constructor(onSend) {
    this.#onSend = onSend;
    this.#send.addEventListener("click", () => this.#sendAll());
    this.#change.addEventListener("click", () => {
      this.#isEditing = true;
      this.show(this.#answer, this.#results);
    });
    this.element = h(
      "div.calls",
      { hidden: true },
      this.#list,
      h("div.calls-actions", {}, this.#send, this.#change),
    );
  }

  /**
   * @param {import("./answer.js").Answer} answer
   * @param {string[]} results as far as there are any
   */
  show(answer, results) {
    this.#answer = answer;
    this.#results = results;
    const { calls } = answer;
    this.element.hidden = calls.length === 0;
    while (this.#cards.length < calls.length) {
      const card = new ToolCallView(() => this.#enable(), () => this.#sendAll());
      this.#cards.push(card);
      this.#list.append(card.element);
    }
    const isWriting = answer.state === "writing";
    for (const [index, call] of calls.entries()) {
      const isComplete = !isWriting || index < calls.length - 1;
      const result = results[index] ?? null;
      this.#cards[index].show(call, { isComplete, result, isEditing: this.#isEditing });
    }
    const isAnswered = results.length === calls.length && !this.#isEditing;
    this.#send.hidden = isWriting || isAnswered;
    this.#send.textContent = calls.length === 1 ? "Send the result" : "Send all results";
    this.#change.hidden = isWriting || !isAnswered;
    this.#enable();
  }

  #enable() {
    this.#send.disabled = this.#cards.some((card) => !card.value.trim());
  }

  #sendAll() {
    this.#enable();
    if (this.#send.disabled) return;
    this.#isEditing = false;
    this.#onSend(this.#cards.map((card) => card.value));
  }
}
