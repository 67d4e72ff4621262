// Which model answers, and whether its server is well.

import { byId, h } from "./dom.js";
import { brief, count } from "./format.js";

const EVERY_MS = 20_000;

export class ServerBadge {
  #badge = byId("badge");
  #picker = byId("model");
  #api;
  #settings;
  #onModel;
  /** @type {{ id: string, max_model_len?: number }[]} */
  #models = [];

  /**
   * @param {ReturnType<import("./api.js").createApi>} api
   * @param {import("./settings.js").Settings} settings whose model the picker changes
   * @param {() => void} onModel is called when the model is known, or another
   */
  constructor(api, settings, onModel) {
    this.#api = api;
    this.#settings = settings;
    this.#onModel = onModel;
    this.#picker.addEventListener("change", () => {
      settings.model = this.#picker.value;
      this.#show("ok");
      onModel();
    });
    setInterval(() => document.hidden || this.refresh(), EVERY_MS);
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
  }

  /** The model that answers; undefined while no server was reached. */
  get model() {
    return this.#models.find(({ id }) => id === this.#settings.model) ?? this.#models[0];
  }

  /** Asks the server how it is. */
  async refresh() {
    try {
      if (!this.#models.length) await this.#loadModels();
      await this.#api.health();
      this.#show("ok");
    } catch (error) {
      if (!error.status) this.#models = []; // another server may come in its place
      this.#show(error.status === 401 ? "locked" : error.status ? "ill" : "away", error.message);
    }
  }

  /** Asks again for the models: another key may open them. */
  async reload() {
    this.#models = [];
    await this.refresh();
  }

  async #loadModels() {
    this.#models = await this.#api.models();
    this.#picker.replaceChildren(...this.#models.map(({ id }) => h("option", { value: id }, id)));
    this.#picker.value = this.model.id;
    this.#onModel();
  }

  #show(state, problem = "") {
    const length = this.model?.max_model_len;
    const name = { ok: this.model?.id, locked: "API key needed", ill: "not well", away: "offline" };
    this.#badge.dataset.state = state;
    this.#badge.querySelector(".badge-name").textContent = name[state];
    this.#badge.querySelector(".badge-length").textContent =
      state === "ok" && length ? brief(length) : "";
    this.#badge.title =
      problem || (length ? `${this.model.id} · ${count(length)} tokens of context` : name[state]);
  }
}
