// Below a turn: what it took, and what can be done with it.

import { h, iconButton } from "./dom.js";
import { count, duration, listed, plural, speed } from "./format.js";

const ENDS = {
  length: "cut off at the token limit",
  content_filter: "filtered",
  repetition: "stopped: it repeated itself",
};

/**
 * What an answer took, in short phrases.
 *
 * @param {import("./answer.js").Answer} answer
 * @returns {string}
 */
export function statsOf({ stats, state, finish }) {
  const phrases = [];
  if (stats.completionTokens) phrases.push(plural(stats.completionTokens, "token"));
  if (stats.tokensPerSecond) phrases.push(speed(stats.tokensPerSecond));
  if (stats.firstTokenMs !== null) {
    phrases.push(`first token ${duration(stats.firstTokenMs / 1000)}`);
  }
  if (stats.firstTokenMs !== null && stats.cachedTokens !== null && stats.promptTokens) {
    phrases.push(`${count(stats.cachedTokens)} of ${count(stats.promptTokens)} cached`);
  }
  if (state === "stopped") phrases.push("stopped");
  else if (ENDS[finish]) phrases.push(ENDS[finish]);
  return listed(phrases);
}

/** Arrows between a turn and its alternatives; hidden if it has none. */
export class BranchSwitch {
  #label = h("span");
  #back;
  #forward;

  /** @param {(step: -1 | 1) => void} onStep */
  constructor(onStep) {
    this.#back = iconButton("left", "Previous version", () => onStep(-1));
    this.#forward = iconButton("right", "Next version", () => onStep(1));
    this.element = h("div.branches", {}, this.#back, this.#label, this.#forward);
  }

  /** @param {number} place from 0 */
  show(place, length) {
    this.element.hidden = length < 2;
    this.#label.textContent = `${place + 1} / ${length}`;
    this.#back.disabled = place === 0;
    this.#forward.disabled = place === length - 1;
  }
}
