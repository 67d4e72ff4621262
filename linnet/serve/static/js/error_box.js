// Why an answer failed, and a button for another attempt.

import { h, icon } from "./dom.js";

export class ErrorBox {
  #message = h("p");
  #retry = h("button.quiet", { type: "button" });
  #timer = 0;
  #shown = null;

  /** @param {() => void} onRetry */
  constructor(onRetry) {
    this.#retry.addEventListener("click", onRetry);
    this.element = h(
      "div.error-box",
      { role: "alert", hidden: true },
      icon("warning"),
      this.#message,
      this.#retry,
    );
  }

  /** @param {{ message: string, retryAfter: number } | null} error */
  show(error) {
    if (error === this.#shown) return;
    this.#shown = error;
    this.element.hidden = !error;
    clearTimeout(this.#timer);
    if (!error) return;
    this.#message.textContent = error.message;
    this.#countDown(Math.min(error.retryAfter, 600));
  }

  #countDown(seconds) {
    this.#retry.disabled = seconds > 0;
    this.#retry.textContent = seconds > 0 ? `Retry in ${Math.ceil(seconds)} s` : "Retry";
    if (seconds > 0) this.#timer = setTimeout(() => this.#countDown(seconds - 1), 1000);
  }
}
