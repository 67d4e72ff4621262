// How much of the prompt the model has read, until it writes.

import { count, duration, listed, speed } from "./format.js";
import { h } from "./dom.js";

export class PrefillView {
  #bar = h("progress", { "aria-label": "Prompt read" });
  #label = h("span");

  constructor() {
    this.element = h("div.prefill", { hidden: true }, this.#bar, this.#label);
  }

  /** @param {import("./answer.js").Answer} answer */
  show({ state, stats, progress }) {
    this.element.hidden = state !== "writing" || stats.firstTokenMs !== null;
    if (this.element.hidden) return;
    this.#label.textContent = progress ? describe(progress) : "Waiting for the server";
    if (progress) {
      this.#bar.max = progress.total;
      this.#bar.value = progress.processed;
    } else this.#bar.removeAttribute("value");
  }
}

function describe({ total, cache, processed, time_ms: timeMs }) {
  const phrases = [`Reading ${count(processed)} of ${count(total)} tokens`];
  if (cache) phrases.push(`${count(cache)} cached`);
  const perSecond = ((processed - cache) * 1000) / timeMs;
  if (processed > cache && timeMs > 500) {
    phrases.push(speed(perSecond));
    const left = (total - processed) / perSecond;
    if (left > 1) phrases.push(`${duration(Math.round(left))} left`);
  }
  return listed(phrases);
}
