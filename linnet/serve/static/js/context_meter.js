// How much of the model's context the next request takes, before it is sent.

import { brief, count } from "./format.js";

const NARROW = 0.8; // part of the context from which the meter warns

export class ContextMeter {
  #element;
  #past;
  #next;
  #label;

  /** @param {HTMLElement} element with two bars and a label */
  constructor(element) {
    this.#element = element;
    [this.#past, this.#next] = element.querySelectorAll("i");
    this.#label = element.querySelector("span");
  }

  /**
   * @param {object} tokens
   * @param {number} tokens.past of the chat so far
   * @param {number} tokens.next of the message and its files
   * @param {number | undefined} tokens.limit of the model; undefined while it is not known
   */
  show({ past, next, limit }) {
    const used = past + next;
    this.#element.hidden = !limit;
    if (!limit) return;
    this.#past.style.width = `${Math.min(100, (past / limit) * 100)}%`;
    this.#next.style.width = `${Math.min(100, (next / limit) * 100)}%`;
    this.#label.textContent = `${used < 10_000 ? count(used) : brief(used)} / ${brief(limit)}`;
    const excess = used - limit;
    this.#element.dataset.level = excess > 0 ? "over" : used > NARROW * limit ? "narrow" : "fine";
    this.#element.title =
      `${count(past)} tokens of this chat + ${count(next)} of your message, ` +
      `of ${count(limit)} that fit` +
      (excess > 0 ? `: ${count(excess)} too many` : "");
    this.#element.setAttribute("aria-label", `Context: ${this.#element.title}`);
  }
}
